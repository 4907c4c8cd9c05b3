"""The machine and what runs on it."""


def doctor() -> None:
    """Say what this machine, or the image on it, offers for training, and for each problem what mends it.

    Nothing is written. It ends with exit code 3 if there is a problem.
    """
    from nanochat.cluster.doctor import examine, table
    from nanochat.errors import PreflightError
    from nanochat.identity import version_line

    print(version_line(), flush=True)
    findings = examine()
    print(table(findings))
    problems = sum(finding.state == "PROBLEM" for finding in findings)
    if problems:
        raise PreflightError(f"{problems} of {len(findings)} findings are problems", "the line of each says the fix")
