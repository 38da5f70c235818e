"""Looks up known vulnerabilities of what is installed, with pip-audit; ``make audit`` calls it.

Ends with 1 if there is one, with 0 if there is none, or if nobody could be asked: that is said.
"""

import json
import subprocess
import sys


def main() -> int:
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable", "--format", "json", "--timeout", "15"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except ValueError:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        print(f"audit: skipped, for pip-audit found no advisories here ({lines[-1]})")
        return 0
    asked = [package for package in packages if "vulns" in package]
    if not asked:
        print(f"audit: skipped, for the registry at hand has no advisories on any of {len(packages)} packages")
        return 0
    found = [(package, advisory) for package in asked for advisory in package["vulns"]]
    for package, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"{package['name']} {package['version']}: {advisory['id']}, mended in {fixed}")
    print(f"audit: {len(asked)} of {len(packages)} packages looked up, {len(found)} advisories")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
