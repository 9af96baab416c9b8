def write_report(store, path): pass
