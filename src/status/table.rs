//! Lays the state of a mesh out for people: one table per role.

use std::fmt::Write as _;

use proto::v1::{NodeStatus, RouterStatus};

use crate::status::ask::{GatewayStatus, Mesh, Seen};
use crate::status::placement;

/// All tables of a mesh.
pub fn render(mesh: &Mesh) -> String {
    let mut text = String::new();
    if let Some(about) = &mesh.about {
        let _ = writeln!(text, "{about}\n");
    }
    if !mesh.gateways.is_empty() {
        text += &table(&["gateway", "state", "model", "endpoint"], &rows(&mesh.gateways, gateway));
    }
    if !mesh.routers.is_empty() {
        let head = [
            "router",
            "state",
            "running",
            "waiting",
            "kv pages",
            "prefilled",
            "generated",
            "epoch",
            "nodes",
            "numerics",
            "device",
            "endpoint",
        ];
        text += &table(&head, &rows(&mesh.routers, router));
    }
    if !mesh.nodes.is_empty() {
        let head = [
            "expert node",
            "state",
            "experts",
            "frames",
            "rows",
            "queued",
            "refused",
            "resident",
            "numerics",
            "device",
            "endpoint",
        ];
        text += &table(&head, &rows(&mesh.nodes, node));
    }
    if let Some(known) = &mesh.placement {
        text += &placement::render(known);
    }
    text.truncate(text.trim_end().len());
    text.push('\n');
    text
}

fn gateway(gateway: &GatewayStatus) -> Vec<String> {
    let state =
        gateway.unready.as_ref().map_or("ready".to_owned(), |why| format!("not ready: {why}"));
    vec![state, gateway.model.clone()]
}

fn router(status: &RouterStatus) -> Vec<String> {
    let state = match (status.draining, status.ready) {
        (true, _) => "draining".to_owned(),
        (false, true) => "ready".to_owned(),
        (false, false) => format!("not ready: {}", status.detail),
    };
    let connected = status.nodes.iter().filter(|peer| peer.connected).count();
    vec![
        state,
        status.running.to_string(),
        format!("{}/{}", status.waiting, status.max_waiting),
        format!("{}/{}", status.kv_pages_used, status.kv_pages_total),
        status.tokens_prefilled.to_string(),
        status.tokens_generated.to_string(),
        status.epoch.to_string(),
        format!("{connected}/{}", status.nodes.len()),
        status.numerics.clone(),
        status.device.clone(),
    ]
}

fn node(status: &NodeStatus) -> Vec<String> {
    let described = status.description.clone().unwrap_or_default();
    let experts: usize = described.owned.iter().map(|layer| layer.experts.len()).sum();
    vec![
        if described.draining { "draining" } else { "ready" }.to_owned(),
        experts.to_string(),
        status.frames.to_string(),
        status.rows.to_string(),
        status.queued_rows.to_string(),
        status.refused.to_string(),
        match described.capacity_bytes {
            0 => bytes(status.resident_bytes),
            most => format!("{} of {}", bytes(status.resident_bytes), bytes(most)),
        },
        described.numerics,
        described.device,
    ]
}

/// Rows of one role: the name, what the process said, and where it is. One that
/// did not answer has the reason for its state and nothing else.
fn rows<T>(seen: &[Seen<T>], cells: impl Fn(&T) -> Vec<String>) -> Vec<Vec<String>> {
    seen.iter()
        .map(|Seen { id, endpoint, answer }| {
            let mut row = vec![id.clone()];
            match answer {
                Ok(answer) => {
                    row.extend(cells(answer));
                    row.push(endpoint.clone());
                }
                Err(why) => row.push(format!("{why} ({endpoint})")),
            }
            row
        })
        .collect()
}

/// Columns as wide as their widest cell. The last cell of a row widens nothing,
/// so that one long reason does not push a whole table aside.
/// Columns as wide as they need to be, under their titles.
pub fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let head: Vec<String> = head.iter().map(|title| title.to_uppercase()).collect();
    let mut widths = vec![0; head.len()];
    for row in std::iter::once(&head).chain(rows) {
        let inner = row.len().saturating_sub(1);
        for (width, cell) in widths.iter_mut().zip(&row[..inner]) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = String::new();
    for row in std::iter::once(&head).chain(rows) {
        let mut line = String::new();
        for (width, cell) in widths.iter().zip(row) {
            let _ = write!(line, "{cell:<width$}  ");
        }
        text += line.trim_end();
        text.push('\n');
    }
    text.push('\n');
    text
}

/// A size for people.
pub fn bytes(count: u64) -> String {
    match count {
        0..1024 => format!("{count} B"),
        1024..1_048_576 => format!("{:.1} KiB", count as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.1} MiB", count as f64 / 1_048_576.0),
        _ => format!("{:.1} GiB", count as f64 / 1_073_741_824.0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_process_has_a_line_of_its_own() {
        let ready = GatewayStatus { model: "tiny".to_owned(), unready: None };
        let seen =
            |id: &str, answer| Seen { id: id.to_owned(), endpoint: format!("http://{id}"), answer };
        let mesh = Mesh {
            gateways: vec![
                seen("gateway-0", Ok(ready)),
                seen("gateway-1", Err("not reachable".to_owned())),
            ],
            ..Mesh::default()
        };
        let want = "\
GATEWAY    STATE  MODEL  ENDPOINT
gateway-0  ready  tiny   http://gateway-0
gateway-1  not reachable (http://gateway-1)
";
        assert_eq!(render(&mesh), want);
        assert_eq!(mesh.unready(), ["gateway-1 (not reachable)"]);
        assert!(serde_json::from_str::<serde_json::Value>(&mesh.json()).is_ok());
    }

    #[test]
    fn sizes_are_readable() {
        for (count, want) in
            [(5, "5 B"), (1536, "1.5 KiB"), (3 << 20, "3.0 MiB"), (5 << 30, "5.0 GiB")]
        {
            assert_eq!(bytes(count), want);
        }
    }
}
