ui_tabs = []


def on_ui_tabs(callback, *, name=None):
    ui_tabs.append(callback)


def clear_callbacks():
    ui_tabs.clear()
