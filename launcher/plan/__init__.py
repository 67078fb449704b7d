"""From a recipe and a cluster to everything that is decided before a run."""

from launcher.plan.plan import PLAN_FILE, Plan, checkpoints_url, load_plan, make_plan, read_plan

__all__ = ["PLAN_FILE", "Plan", "checkpoints_url", "load_plan", "make_plan", "read_plan"]
