//! Checks what the routers of one mesh did in office, from the event logs of all of
//! them: nobody had a term that another one had, terms rise, orders are of the term
//! that who gave them was in, and no node obeyed an older order after a newer one.
//! The logs compare by the machine's clock.

use std::collections::BTreeMap;

use serde_json::Value;

/// How much was checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    pub terms: usize,
    pub orders: usize,
    pub refused: usize,
}

/// One order, as who gave it knows it.
struct Order {
    sent: u64,
    answered: u64,
    at: (u64, u64),
    obeyed: bool,
}

/// Checks the logs of all routers of a mesh. Where none was elected, one is the controller
/// by configuration, and its terms are its own affair.
///
/// # Errors
/// What must not be.
pub fn check(logs: &[String]) -> Result<Seen, String> {
    let mut seen = Seen::default();
    // When taken, by whom.
    let mut terms: Vec<(u64, u64, usize)> = Vec::new();
    let mut nodes: BTreeMap<String, Vec<Order>> = BTreeMap::new();
    let mut given = Vec::new();
    for (router, log) in logs.iter().enumerate() {
        // A killed router may leave half a line, which `history` judges.
        let events = log.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        for event in events {
            let number = |key: &str| {
                event[key].as_u64().ok_or_else(|| format!("no number `{key}`: {event}"))
            };
            match event["e"].as_str() {
                Some("term") => terms.push((number("t")?, number("term")?, router)),
                Some("order") => {
                    let at = (number("term")?, number("epoch")?);
                    let (sent, answered) = (number("sent")?, number("t")?);
                    let obeyed = event["obeyed"].as_bool().ok_or("no `obeyed`")?;
                    let node = event["node"].as_str().ok_or("no `node`")?.to_owned();
                    given.push((router, sent, at));
                    nodes.entry(node).or_default().push(Order { sent, answered, at, obeyed });
                }
                _ => {}
            }
        }
    }
    terms.sort_unstable();
    seen.terms = terms.len();
    if let Some(pair) = terms.windows(2).find(|pair| pair[1].1 <= pair[0].1) {
        let [(_, before, first), (_, after, second)] = [pair[0], pair[1]];
        return Err(format!(
            "router {second} took term {after} after router {first} had taken {before}"
        ));
    }
    for &(router, sent, (term, _)) in &given {
        seen.orders += 1;
        let mut mine = terms.iter().filter(|(at, _, of)| *of == router && *at <= sent);
        let mine = mine.next_back().map(|(_, term, _)| *term);
        if !terms.is_empty() && mine != Some(term) {
            return Err(format!("router {router} ordered in term {term}, it had {mine:?}"));
        }
    }
    for (node, orders) in &mut nodes {
        seen.refused += orders.iter().filter(|order| !order.obeyed).count();
        orders.retain(|order| order.obeyed);
        orders.sort_by_key(|order| order.sent);
        for (at, later) in orders.iter().enumerate() {
            // Those that were under way together may have come in any order.
            let before = orders[..at].iter().filter(|before| before.answered < later.sent);
            if let Some(before) = before.map(|before| before.at).max().filter(|at| *at > later.at) {
                return Err(format!("{node} obeyed {:?} after {before:?}", later.at));
            }
        }
    }
    Ok(seen)
}
