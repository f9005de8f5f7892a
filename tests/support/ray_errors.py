"""Errors as Ray brings them from a task, without a task."""


def as_ray_gives_it(error: Exception) -> Exception:
    """What ``ray.get`` raises for a task's error."""
    from ray.exceptions import RayTaskError

    text = f"\x1b[36mray::write_file()\x1b[39m (pid=7)\n  File ...\n{type(error).__qualname__}: {error}"
    return RayTaskError("write_file", text, error, "ray::write_file", 7, "10.0.0.1").as_instanceof_cause()
