"""The error of a setting that cannot work."""

from __future__ import annotations


class ConfigError(Exception):
    """A setting that cannot work: names the field, its value, the reason and the remedy."""

    def __init__(self, path: str, value: object, reason: str, remedy: str = "") -> None:
        """Keep the parts; the launcher adds where the value was set."""
        self.path, self.value, self.reason, self.remedy = path, value, reason, remedy
        super().__init__(f"`{path}` = {value!r}: {reason}" + (f"\n  remedy: {remedy}" if remedy else ""))

    def parts(self) -> dict[str, str]:
        """Return what another process makes the same error of: ConfigError(**parts)."""
        return {"path": self.path, "value": str(self.value), "reason": self.reason, "remedy": self.remedy}
