"""vop: which photographs see the same thing. `vop.register(images="photos", output="run")`."""
