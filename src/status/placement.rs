//! Who owns what as one router sees it, and what its controller is doing.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use proto::v1::{MemberStatus, PlacementReply};
use serde_json::{Value, json};

/// Lines for people.
pub fn render(placement: &PlacementReply) -> String {
    let mut text = format!("experts: {}", placement.experts);
    let mut parts: BTreeMap<usize, usize> = BTreeMap::new();
    for owners in owners(&placement.nodes).into_values() {
        *parts.entry(owners).or_default() += 1;
    }
    for (owners, experts) in parts {
        let plural = if owners == 1 { "owner" } else { "owners" };
        let _ = write!(text, ", {experts} with {owners} {plural}");
    }
    if placement.missing > 0 {
        let _ = write!(text, ", {} without", placement.missing);
    }
    text.push('\n');
    let Some(controller) = &placement.controller else { return text };
    let order = controller.order.unwrap_or_default();
    let _ = write!(
        text,
        "controller: {}, term {} epoch {}, replicas {}, {} to load, {} to drop",
        placement.router_id,
        order.term,
        order.epoch,
        controller.replicas,
        controller.to_load,
        controller.to_drop
    );
    let draining = placement.nodes.iter().filter(|node| node.draining);
    let draining: Vec<&str> = draining.map(|node| node.node_id.as_str()).collect();
    if !draining.is_empty() {
        let _ = write!(text, "; drained: {}", draining.join(", "));
    }
    if !controller.detail.is_empty() {
        let _ = write!(text, "; {}", controller.detail);
    }
    text.push('\n');
    text
}

pub fn json(placement: &PlacementReply) -> Value {
    let node = |node: &MemberStatus| {
        json!({
            "id": node.node_id,
            "endpoint": node.endpoint,
            "connected": node.connected,
            "draining": node.draining,
            "capacity_bytes": node.capacity_bytes,
            "resident_bytes": node.resident_bytes,
        })
    };
    let controller = placement.controller.as_ref().map(|controller| {
        let order = controller.order.unwrap_or_default();
        json!({
            "term": order.term,
            "epoch": order.epoch,
            "replicas": controller.replicas,
            "to_load": controller.to_load,
            "to_drop": controller.to_drop,
            "detail": controller.detail,
        })
    });
    json!({
        "router": placement.router_id,
        "epoch": placement.epoch,
        "experts": placement.experts,
        "missing": placement.missing,
        "nodes": placement.nodes.iter().map(node).collect::<Vec<Value>>(),
        "controller": controller,
    })
}

/// How many live owners each expert has that has any.
fn owners(nodes: &[MemberStatus]) -> BTreeMap<(u32, u32), usize> {
    let mut owners = BTreeMap::new();
    for of in nodes.iter().flat_map(|node| &node.owned) {
        for &expert in &of.experts {
            *owners.entry((of.layer, expert)).or_default() += 1;
        }
    }
    owners
}

#[cfg(test)]
mod tests {
    use proto::v1::{ControllerStatus, LayerExperts, Order};

    use super::*;

    #[test]
    fn owners_and_moves_are_told() {
        let node = |name: &str, experts: &[u32]| MemberStatus {
            node_id: name.to_owned(),
            draining: name == "b",
            owned: vec![LayerExperts { layer: 1, experts: experts.to_vec() }],
            ..MemberStatus::default()
        };
        let placement = PlacementReply {
            router_id: "router-0".to_owned(),
            experts: 4,
            missing: 1,
            nodes: vec![node("a", &[0, 1]), node("b", &[1, 2])],
            controller: Some(ControllerStatus {
                order: Some(Order { term: 9, epoch: 2 }),
                replicas: 1,
                to_load: 1,
                to_drop: 2,
                detail: String::new(),
            }),
            ..PlacementReply::default()
        };
        assert_eq!(
            render(&placement),
            "experts: 4, 2 with 1 owner, 1 with 2 owners, 1 without\n\
             controller: router-0, term 9 epoch 2, replicas 1, 1 to load, 2 to drop; drained: b\n"
        );
        assert_eq!(json(&placement)["controller"]["to_drop"], 2);
    }
}
