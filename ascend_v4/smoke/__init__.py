"""`ascend-v4 smoke`: what is run first on a new machine, from device facts to a chat, with a report."""

from ascend_v4.smoke.report import PARTS, Report, Row, Status
from ascend_v4.smoke.run import SmokeConfig, run_smoke

__all__ = ["PARTS", "Report", "Row", "SmokeConfig", "Status", "run_smoke"]
