"""What a job would take, before it is started: rates measured here, arithmetic of every stage. No Ray."""
