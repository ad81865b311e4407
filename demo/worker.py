"""One worker of the demo's fleet: a process on the Python client package, as anybody would write it.

`python -m demo.worker --name worker-1 --site URL --work FOLDER` with the MUSTER_* variables of `client.env`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
from datetime import timedelta
from pathlib import Path

import muster

from demo.crawl import CrawlOutcome, Manners, crawl
from demo.journal import Crawled, Journal, Leased, Saved, Submitted

# The site is on loopback; a person would read a page for longer than this.
_PAGE_SECONDS = 0.25


async def main(name: str, site: str, work: Path, idle_seconds: float) -> None:
    """Works until there has been nothing to do for `idle_seconds`."""
    journal = Journal(work / "journals" / f"{name}-{os.getpid()}.jsonl")
    number = int(name.rpartition("-")[2])
    async with (
        muster.Client.from_environment() as client,
        muster.Worker(client, client_id=f"pc-{(number - 1) // 2 + 1}", instance_number=number) as worker,
    ):
        async for job in worker.jobs(stop_when_idle=timedelta(seconds=idle_seconds)):
            async with job:
                await _work(job, journal, name, site, work / "profiles" / name)


async def _work(job: muster.Job, journal: Journal, name: str, site: str, profile: Path) -> None:
    exit_endpoint = job.exit.endpoint if job.exit else ""
    persona_id = job.persona.persona_id if job.persona else ""
    journal.write(Leased(name, job.key, job.slot_id, job.keyword, exit_endpoint, persona_id))
    shutil.rmtree(profile, ignore_errors=True)
    profile.mkdir(parents=True)
    history: list[object] = []
    if job.persona is not None:
        bundle = await job.load_bundle()
        bundle.restore_profile(profile)
        history = bundle.history or []

    async def on_page(page: int, total: int, products: int, errors: int) -> None:
        job.progress(page=page, total=total, products=products, errors=errors, stage="reading results")

    job.progress(page=0, total=0, products=0, stage="searching")
    # A unit is a few seconds' work, so it is finished even when its lease is lost meanwhile: the service decides
    # whether the late result counts.
    max_pages = int(job.settings.get("max_pages", 3))
    manners = Manners(delay_seconds=_PAGE_SECONDS)
    outcome = await crawl(site, exit_endpoint, job.keyword, max_pages, profile, on_page, manners=manners)
    journal.write(
        Crawled(name, job.key, outcome.pages, outcome.requests, len(outcome.products), persona_id, outcome.visits)
    )
    if job.persona is not None:
        await _save(job, journal, name, profile, outcome, history)
    await _submit(job, journal, name, outcome)


async def _save(
    job: muster.Job, journal: Journal, name: str, profile: Path, outcome: CrawlOutcome, history: list[object]
) -> None:
    assert job.persona is not None
    state = {
        "checkpoint": {"keyword": job.keyword, "pages": outcome.pages},
        "exit": job.exit.endpoint if job.exit else "",
        "allocation_key": job.key,
    }
    history.append({"keyword": job.keyword, "work_date": str(job.work_date), "found": len(outcome.products)})
    try:
        generation = await job.save_bundle(profile=profile, state=state, history=history[-50:])
    except muster.CheckOutLost:
        # The lease ran out and somebody else may hold the persona by now: what this run learned of it is lost.
        return
    journal.write(Saved(name, job.key, job.persona.persona_id, generation.generation))


async def _submit(job: muster.Job, journal: Journal, name: str, outcome: CrawlOutcome) -> None:
    products = [
        muster.Product(
            product_id=product.product_id,
            title=product.title,
            url=product.url,
            rank=product.rank,
            attributes={"summary": product.summary},
        )
        for product in outcome.products
    ]
    if outcome.blocked:
        wait = timedelta(seconds=outcome.retry_after_seconds or 0)
        disposition = await job.blocked("too_many_requests", retry_after=wait, products=products)
        ended = "blocked"
    elif outcome.failed:
        disposition = await job.fail(outcome.errors[0])
        ended, products = "failed", []
    else:
        disposition = await job.succeed(products=products)
        ended = "succeeded"
    journal.write(Submitted(name, job.key, ended, disposition.name, len(products)))


def run() -> None:
    """Runs one worker as its command line says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", required=True)
    parser.add_argument("--site", required=True)
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--idle-seconds", type=float, default=5.0)
    given = parser.parse_args()
    asyncio.run(main(given.name, given.site, given.work, given.idle_seconds))


if __name__ == "__main__":
    run()
