"""`nograd.predict` as a plain Celery task: what the batch pool's answers are compared with."""

from celery import shared_task

from own_tasks import Busy, triple


class Overloaded(Exception):  # noqa: N818 - the name of ours
    """Named as ours."""


class ModelFailed(Exception):  # noqa: N818 - the name of ours
    """Named as ours."""


@shared_task(name="nograd.predict", bind=True, max_retries=5)
def predict(self, *args, model=None):
    value = args[-1] if model else args[1]
    try:
        return triple(value)
    except Busy as err:
        raise self.retry(exc=Overloaded(str(err)), countdown=0.1) from err
    except Exception as err:
        raise ModelFailed(f"{type(err).__name__}: {err}") from err
