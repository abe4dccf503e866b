def recognise(w, t, d):
    return None
