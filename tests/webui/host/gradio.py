"""A stand-in for the gradio that the hosts bring: components keep what they were made with."""


class Component:
    def __init__(self, *args, **settings):
        self.args, self.settings, self.value = args, settings, settings.get("value")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def click(self, function, inputs, outputs):
        self.function, self.inputs, self.outputs = function, inputs, outputs
        clicks.append(self)


class Progress:
    def __call__(self, fraction, desc=None):
        reports.append((fraction, desc))


clicks, reports = [], []
Accordion = Blocks = Button = Checkbox = Dropdown = Markdown = Radio = Row = Slider = Textbox = Component
