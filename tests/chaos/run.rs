//! Carries a scenario out: an undisturbed load first, for what streams must say
//! and how fast; then the same load with faults; then the checks.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::history;
use super::inflict::{Inflict, NEVER, Struck};
use super::load::{Balancer, Clients, Outcome, asks};
use super::observe::{Counters, Figures, Report, is_whole, ms, until};
use super::offices;
use super::scenario::{Check, Scenario, When, is_long, seed};
use crate::support::dice::Dice;
use crate::support::{Sandbox, block_on};

/// The undisturbed load runs at least so long, and until every request was answered.
const CALM: Duration = Duration::from_millis(1500);
const LONG_CALM: Duration = Duration::from_secs(5);
/// No mesh takes so long to be whole again.
const PATIENCE: Duration = Duration::from_secs(60);
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// One scenario has the machine at a time.
static MACHINE: Mutex<()> = Mutex::new(());

/// Runs `body` when no other scenario does.
pub fn alone<T>(body: impl Future<Output = T>) -> T {
    let _turn = MACHINE.lock();
    block_on(body)
}

/// Runs the scenario, prints its figures, and panics on every check that fails.
pub fn run(scenario: Scenario) {
    let seed = seed();
    println!("{} {}: seed {seed}", scenario.id, scenario.title);
    let (id, title) = (scenario.id, scenario.title);
    let (wrong, took) = alone(async {
        let begun = Instant::now();
        (perform(scenario, seed).await, begun.elapsed())
    });
    println!("{id} took {took:.1?}");
    assert!(wrong.is_empty(), "{id} {title}, seed {seed}:\n  {}", wrong.join("\n  "));
}

async fn perform(scenario: Scenario, seed: u64) -> Vec<String> {
    let Scenario { id, title, mesh, load, faults, checks } = scenario;
    let wants_history = checks.iter().any(|check| matches!(check, Check::History));
    let plan = mesh.logged();
    let plan = if wants_history { plan.history() } else { plan };
    let mut mesh = plan.start().await;
    let patient = until(PATIENCE, async || is_whole(&mesh).await).await;
    assert!(patient.is_some(), "the mesh never became whole");

    let asks = Arc::new(asks(load.tokens));
    let balancer = Arc::new(Balancer::new(&mesh.addresses));
    let begun = Instant::now();
    let clients = Clients::start(load.streams, asks.clone(), balancer.clone());
    let calm = if is_long() { LONG_CALM } else { CALM };
    until(PATIENCE, async || {
        let answered: HashSet<usize> = clients.answered().into_iter().collect();
        begun.elapsed() >= calm && answered.len() == asks.len()
    })
    .await;
    let took = begun.elapsed();
    let samples = clients.finish().await;
    let mut expected = vec![None; asks.len()];
    for sample in &samples {
        if let Outcome::Whole(said) = &sample.outcome {
            expected[sample.ask].get_or_insert_with(|| said.clone());
        }
    }
    let calm = Figures::of(&samples, &expected, took);
    assert!(expected.iter().all(Option::is_some), "undisturbed streams failed: {:?}", calm.cut);
    assert_eq!((calm.different, calm.cut.len(), calm.refused), (0, 0, 0), "before any fault");

    let counters = Counters::default();
    let mut dice = Dice(seed);
    let mut struck = Vec::new();
    let begun = Instant::now();
    let clients = Clients::start(load.streams, asks, balancer.clone());
    let mut kinds = faults.what.iter().cycle();
    let mut inflict = Inflict::new(&balancer);
    match &faults.when {
        When::Every(pause) => {
            while begun.elapsed() + *pause < load.time {
                tokio::time::sleep(*pause).await;
                struck.push(
                    inflict.one(kinds.next().unwrap(), &mut mesh, &counters, &mut dice).await,
                );
            }
            while begun.elapsed() < load.time {
                counters.look(&mesh).await;
                tokio::time::sleep(LOOK_EVERY.min(load.time - begun.elapsed().min(load.time)))
                    .await;
            }
        }
        When::Event(positions) => {
            for &position in positions {
                wait_for(&clients, position).await;
                struck.push(
                    inflict.one(kinds.next().unwrap(), &mut mesh, &counters, &mut dice).await,
                );
            }
        }
    }
    let took = begun.elapsed();
    let samples = clients.finish().await;
    mesh.wait_idle().await;
    counters.look(&mesh).await;
    let run = Figures::of(&samples, &expected, took);

    let mut report = Report {
        id,
        title: title.to_owned(),
        seed,
        calm,
        run,
        faults: struck.len(),
        in_flight: struck.iter().filter(|one| one.running > 0).count(),
        recovery: struck.iter().map(|one| one.whole).collect(),
        frames: counters.frames.sum(),
        retries: counters.retries.sum(),
        stale: counters.stale.sum(),
        resumed: counters.resumed.sum(),
        damaged: counters.damaged.sum(),
        notes: inflict.notes(),
    };
    let history = if wants_history { Some(histories(&mesh)) } else { None };
    match &history {
        Some(Ok(seen)) => report.notes.push(format!("history: {seen}")),
        Some(Err(_)) => report.notes.push("history: broken".to_owned()),
        None => {}
    }
    report.print();
    mesh.stop();
    judge(&report, &checks, &struck, history)
}

/// Until the first client's stream has had `position` events, or has just begun.
async fn wait_for(clients: &Clients, position: usize) {
    let seen = || clients.progress[0].load(Ordering::Relaxed);
    // A new stream first, so that the fault hits it where it should.
    let ended = clients.ended();
    until(PATIENCE, async || clients.ended() > ended && seen() <= position).await;
    while seen() < position {
        tokio::time::sleep(Duration::from_micros(200)).await;
    }
}

/// Checks the event log of every router, and all together.
pub fn histories(mesh: &Sandbox) -> Result<history::Seen, String> {
    let (mut all, mut logs) = (history::Seen::default(), Vec::new());
    for router in &mesh.routers {
        let text = recorded(mesh, &router.name).map_err(|error| error.to_string())?;
        all += history::check(&text).map_err(|wrong| format!("{}: {wrong}", router.name))?;
        logs.push(text);
    }
    offices::check(&logs)?;
    Ok(all)
}

/// A router's event log.
pub fn recorded(mesh: &Sandbox, router: &str) -> std::io::Result<String> {
    std::fs::read_to_string(mesh.dir.join(format!("{router}.history")))
}

fn judge(
    report: &Report,
    checks: &[Check],
    struck: &[Struck],
    mut history: Option<Result<history::Seen, String>>,
) -> Vec<String> {
    let run = &report.run;
    let again = history.iter().flatten().map(|seen| seen.again).sum::<usize>();
    let mut wrong = Vec::new();
    // A run in which nothing was hit shows nothing.
    if report.in_flight == 0 {
        wrong.push(format!("none of {} faults hit work in flight", report.faults));
    }
    for one in struck.iter().filter(|one| one.whole == NEVER) {
        wrong.push(format!("never whole again after {}", one.what));
    }
    for check in checks {
        let problem = match check {
            Check::NoneFailed if !run.cut.is_empty() || run.refused > 0 => {
                Some(format!("{} refused, cut: {:?}", run.refused, run.cut))
            }
            Check::Identical if run.different > 0 => {
                Some(format!("{} of {} streams differ", run.different, run.answered))
            }
            Check::Answered(least) if run.answered < *least => {
                Some(format!("only {} of {least} requests were answered", run.answered))
            }
            // Either counter will do: a frame that is late is not counted per node.
            Check::Retried if report.retries < 1.0 && again == 0 => {
                Some("no frame was sent again".to_owned())
            }
            Check::Resumed if report.resumed < 1.0 => Some("no stream was resumed".to_owned()),
            Check::Noticed(least) if report.damaged < *least as f64 => {
                Some(format!("{} of {least} flipped bits were noticed", report.damaged))
            }
            Check::Amplification(most) if report.amplification() > *most => {
                Some(format!("amplification ×{:.3} of {most}", report.amplification()))
            }
            Check::Gap(most) if run.gap_max > *most => {
                Some(format!("a gap of {} ms, bar {most:?}", ms(run.gap_max)))
            }
            Check::Recovery(most) => {
                let slow = report.recovery.iter().filter(|took| *took > most).count();
                (slow > 0)
                    .then(|| format!("{slow} recoveries over {most:?}: {:?}", report.recovery))
            }
            Check::History => match history.take() {
                Some(Err(why)) => Some(format!("history: {why}")),
                _ => None,
            },
            _ => None,
        };
        wrong.extend(problem);
    }
    wrong
}
