"""The training loop for experts, teachers and students, and the engine that runs K of it at once."""
