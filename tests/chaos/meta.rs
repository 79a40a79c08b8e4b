//! The checks are checked: what a broken router would have logged is refused,
//! and each harm of the fault proxy is really done.

use std::time::Duration;

use serde_json::{Value, json};

use super::run::{alone, histories};
use super::scenario::seed;
use super::{history, offices};
use crate::support::dice::Dice;
use crate::support::{Sandbox, http, tiny};

/// A log of a mesh that loses a node under load.
async fn recorded() -> String {
    let plan = Sandbox::of(tiny()).expert_nodes(3).replicas(2).history().logged();
    let mut mesh = plan.start().await;
    let address = mesh.http.clone();
    // One ends long before the other.
    let asked: Vec<_> = [40, 120]
        .map(|tokens| {
            let address = address.clone();
            let body =
                json!({ "prompt": "Once upon a time", "max_tokens": tokens, "ignore_eos": true });
            tokio::spawn(async move { http::post(&address, "/v1/completions", &body).await.0 })
        })
        .into();
    while mesh.router_status().await.tokens_generated < 20 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    mesh.nodes[1].kill();
    for asked in asked {
        assert_eq!(asked.await.unwrap(), 200);
    }
    mesh.wait_idle().await;
    histories(&mesh).unwrap();
    std::fs::read_to_string(mesh.dir.join("router-0.history")).unwrap()
}

type Mutation = (&'static str, fn(&mut Vec<Value>, &mut Dice) -> bool);

/// A random line of a kind that `wanted` accepts.
fn some(
    log: &[Value],
    dice: &mut Dice,
    kind: &str,
    wanted: impl Fn(&Value) -> bool,
) -> Option<usize> {
    let all: Vec<usize> =
        (0..log.len()).filter(|&at| log[at]["e"] == kind && wanted(&log[at])).collect();
    (!all.is_empty()).then(|| all[dice.below(all.len())])
}

fn any(_: &Value) -> bool {
    true
}

/// Each does one wrong to the log; false if the log has nothing to do it to.
const MUTATIONS: [Mutation; 12] = [
    ("a result that was never applied", |log, dice| {
        some(log, dice, "taken", any).map(|at| log.remove(at)).is_some()
    }),
    ("a result applied twice", |log, dice| {
        some(log, dice, "taken", any).map(|at| log.insert(at, log[at].clone())).is_some()
    }),
    ("a slot applied that had its result", |log, dice| {
        some(log, dice, "taken", any)
            .map(|at| log[at]["applied"] = json!(log[at]["applied"].as_u64().unwrap() + 1))
            .is_some()
    }),
    ("a reply taken from another node", |log, dice| {
        some(log, dice, "taken", any)
            .map(|at| log[at]["node"] = json!(log[at]["node"].as_u64().unwrap() + 1))
            .is_some()
    }),
    ("a late reply taken", |log, dice| {
        let Some(at) = some(log, dice, "taken", any) else { return false };
        let done = (at..log.len()).find(|&later| log[later]["e"] == "done").unwrap();
        let late = log[at].clone();
        log.insert(done + 1, late);
        true
    }),
    ("a frame under an epoch of the future", |log, dice| {
        some(log, dice, "sent", any).map(|at| log[at]["epoch"] = json!(999)).is_some()
    }),
    ("a frame under an epoch of the past", |log, dice| {
        some(log, dice, "sent", |sent| sent["epoch"].as_u64().unwrap() > 1)
            .map(|at| log[at]["epoch"] = json!(1))
            .is_some()
    }),
    ("a frame to a node that does not own its experts", |log, dice| {
        some(log, dice, "sent", any).map(|at| log[at]["node"] = json!(77)).is_some()
    }),
    ("a slot twice in a frame", |log, dice| {
        let two = |sent: &Value| sent["slots"].as_array().unwrap().len() > 1;
        some(log, dice, "sent", two)
            .map(|at| log[at]["slots"][1] = log[at]["slots"][0].clone())
            .is_some()
    }),
    ("an expert without an owner though a node holds it", |log, dice| {
        let owned = |placement: &Value| {
            let mut cells = placement["owners"].as_array().unwrap().iter();
            cells.any(|cell| !cell[2].as_array().unwrap().is_empty())
        };
        let Some(at) = some(log, dice, "placement", owned) else { return false };
        let cells = log[at]["owners"].as_array_mut().unwrap();
        let cell = cells.iter_mut().find(|cell| !cell[2].as_array().unwrap().is_empty());
        cell.unwrap()[2] = json!([]);
        true
    }),
    ("an epoch that does not rise", |log, dice| {
        let later = |placement: &Value| placement["epoch"].as_u64().unwrap() > 1;
        some(log, dice, "placement", later).map(|at| log[at]["epoch"] = json!(1)).is_some()
    }),
    ("work for a sequence that has left", |log, dice| {
        let Some(at) = some(log, dice, "end", any) else { return false };
        let seq = log[at]["seq"].clone();
        let step = log.iter_mut().skip(at).find(|event| event["e"] == "step");
        step.map(|step| step["seqs"].as_array_mut().unwrap().push(seq)).is_some()
    }),
];

#[test]
fn a_history_with_one_wrong_in_it_is_refused() {
    let text = alone(recorded());
    let log = events(&text);
    let seen = history::check(&text).unwrap();
    println!("recorded: {seen}");
    // A kill between two frames has nothing to send again.
    assert!(seen.steps > 50, "{seen}");
    let seed = seed();
    let mut dice = Dice(seed);
    for (name, mutate) in MUTATIONS {
        let mut done = 0;
        for _ in 0..8 {
            let mut wrong = log.clone();
            if mutate(&mut wrong, &mut dice) {
                let text: Vec<String> = wrong.iter().map(Value::to_string).collect();
                let verdict = history::check(&text.join("\n"));
                assert!(verdict.is_err(), "seed {seed}: {name} passed");
                done += 1;
            }
        }
        assert!(done > 0, "seed {seed}: nothing to try {name} on");
    }
}

fn events(text: &str) -> Vec<Value> {
    // A killed router may have left half a line.
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

type Offices = Vec<Vec<Value>>;
type Usurpation = (&'static str, fn(&mut Offices, &mut Dice) -> bool);

/// A random order that a node obeyed; the router that gave it, and its place in the log.
fn obeyed(logs: &Offices, dice: &mut Dice, wanted: impl Fn(&Value) -> bool) -> Option<[usize; 2]> {
    let orders = logs.iter().enumerate().flat_map(|(router, log)| {
        let wanted = &wanted;
        let fits = move |(_, event): &(usize, &Value)| {
            event["e"] == "order" && event["obeyed"] == true && wanted(event)
        };
        log.iter().enumerate().filter(fits).map(move |(at, _)| [router, at])
    });
    let all: Vec<_> = orders.collect();
    (!all.is_empty()).then(|| all[dice.below(all.len())])
}

/// An order after all others, and answered.
fn later(order: &Value, term: u64, epoch: u64) -> Value {
    let mut order = order.clone();
    let sent = order["t"].as_u64().unwrap() + 1_000_000_000;
    order["sent"] = json!(sent);
    order["t"] = json!(sent + 1);
    (order["term"], order["epoch"]) = (json!(term), json!(epoch));
    order
}

/// When a router took the office, and which term: of the first that is in its log.
fn taken(log: &[Value]) -> Option<usize> {
    log.iter().position(|event| event["e"] == "term")
}

const USURPATIONS: [Usurpation; 6] = [
    ("two controllers in one term", |logs, _| {
        let [first, .., last] = &mut logs[..] else { return false };
        let (Some(one), Some(two)) = (taken(first), taken(last)) else { return false };
        last[two]["term"] = first[one]["term"].clone();
        true
    }),
    ("a term that is lower than the last", |logs, _| {
        let [first, .., last] = &mut logs[..] else { return false };
        let (Some(one), Some(two)) = (taken(first), taken(last)) else { return false };
        let late = first[one]["t"].as_u64().max(last[two]["t"].as_u64()).unwrap() + 1;
        last.push(json!({ "t": late, "e": "term", "term": 1 }));
        true
    }),
    ("an order in a term that its giver never had", |logs, dice| {
        let Some([router, at]) = obeyed(logs, dice, any) else { return false };
        let term = logs[router][at]["term"].as_u64().unwrap();
        logs[router][at]["term"] = json!(term + 1);
        true
    }),
    ("an order before its giver was elected", |logs, dice| {
        let Some([router, at]) = obeyed(logs, dice, any) else { return false };
        let Some(elected) = taken(&logs[router]) else { return false };
        let other = (router + 1) % logs.len();
        let early = logs[router][elected]["t"].as_u64().unwrap() - 1;
        logs[router][at]["sent"] = json!(early);
        // Unless it had been in office before.
        taken(&logs[other]).is_some()
    }),
    ("a load with an old term obeyed", |logs, dice| {
        // By a router whose term is over, after the other's order was obeyed.
        let terms: Vec<u64> =
            logs.iter().filter_map(|log| log[taken(log)?]["term"].as_u64()).collect();
        let (Some(old), Some(new)) = (terms.iter().min(), terms.iter().max()) else { return false };
        let of = |term: u64| move |order: &Value| order["term"] == term;
        let Some([from, _]) = obeyed(logs, dice, of(*old)) else { return false };
        let Some([router, at]) = obeyed(logs, dice, of(*new)) else { return false };
        let usurped = later(&logs[router][at], *old, 1_000_000);
        logs[from].push(usurped);
        old < new
    }),
    ("an epoch that falls", |logs, dice| {
        let Some([router, at]) = obeyed(logs, dice, |order| order["epoch"].as_u64() > Some(0))
        else {
            return false;
        };
        let order = &logs[router][at];
        let (term, epoch) = (order["term"].as_u64().unwrap(), order["epoch"].as_u64().unwrap());
        let late = later(order, term, epoch - 1);
        logs[router].push(late);
        true
    }),
];

/// The checks of who was in office, on the logs of a mesh whose controller changed.
pub fn usurpations_are_noticed(logs: &[String]) {
    let seen = offices::check(logs).unwrap();
    println!("in office: {seen:?}");
    assert!(seen.terms > 1 && seen.orders > 1, "{seen:?}");
    let logs: Offices = logs.iter().map(|text| events(text)).collect();
    let seed = seed();
    let mut dice = Dice(seed);
    for (name, usurp) in USURPATIONS {
        let mut done = 0;
        for _ in 0..8 {
            let mut wrong = logs.clone();
            if usurp(&mut wrong, &mut dice) {
                let text = |log: &Vec<Value>| {
                    log.iter().map(Value::to_string).collect::<Vec<_>>().join("\n")
                };
                let texts: Vec<String> = wrong.iter().map(text).collect();
                assert!(offices::check(&texts).is_err(), "seed {seed}: {name} passed");
                done += 1;
            }
        }
        assert!(done > 0, "seed {seed}: nothing to try {name} on");
    }
}

#[test]
fn a_log_may_end_in_half_a_line_but_not_go_on_after_it() {
    let start = "{\"t\":1,\"e\":\"start\",\"router\":\"r\"}";
    let step = "{\"t\":1,\"e\":\"step\",\"n\":1,\"seqs\":[1]}";
    let whole = history::check(&format!("{start}\n{step}\n{{\"t\":2,\"e\"\n{start}\n")).unwrap();
    assert_eq!((whole.lives, whole.steps), (2, 1));
    assert!(history::check(&format!("{start}\n{{\"t\":2\n{step}\n")).is_err());
    assert!(history::check(step).is_err(), "no start");
}
