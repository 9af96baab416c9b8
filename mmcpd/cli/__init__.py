"""The commands of `mmcpd`: one file each, and what they share."""
