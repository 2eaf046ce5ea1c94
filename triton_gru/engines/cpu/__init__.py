"""The recurrence on a CPU: scan.c, built by the machine's compiler at first use."""
