"""What a sweep found, for people to read."""

from pathlib import Path

from lightning_module.sweep_jobs import COMPLETE, Job, read_jobs


def report(sweep_dir: Path) -> list[Job]:
    """Print how every job of a sweep ended, and return their records."""
    jobs = read_jobs(sweep_dir)
    for job in jobs:
        print(f"{job.number}: {job.value if job.state == COMPLETE else job.state} {job.reason}")
    return jobs
