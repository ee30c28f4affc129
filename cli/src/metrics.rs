//! Counters as OpenMetrics text, which Prometheus reads.

use std::fmt;

use anyhow::Result;
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric, text};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Registry;
use usernic::Stats;

/// What HTTP calls the text.
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// A port, as metrics know it.
#[derive(Clone, Debug, Default)]
pub struct PortMetrics {
    /// Its name: the label `port`.
    pub name: String,
    /// Whether somebody is on it.
    pub link_up: bool,
    /// Its counters.
    pub stats: Stats,
    /// What only a switch counts: dropped, filtered, flooded, copies.
    pub switch: Option<[u64; 4]>,
}

/// All that is told.
#[derive(Clone, Debug, Default)]
pub struct Metrics {
    /// The ports.
    pub ports: Vec<PortMetrics>,
    /// Addresses that a switch has learned.
    pub addresses: Option<usize>,
}

/// A counter: its name, what it means, and where it is.
type Counter = (&'static str, &'static str, fn(&PortMetrics) -> Option<u64>);

#[rustfmt::skip]
const COUNTERS: [Counter; 19] = [
    ("usernic_rx_packets", "Frames received from the port", |p| Some(p.stats.rx_packets)),
    ("usernic_rx_bytes", "Their bytes, without FCS", |p| Some(p.stats.rx_bytes)),
    ("usernic_tx_packets", "Frames sent to the port", |p| Some(p.stats.tx_packets)),
    ("usernic_tx_bytes", "Their bytes, without FCS", |p| Some(p.stats.tx_bytes)),
    ("usernic_rx_errors", "Malformed or oversized frames of the other side", |p| Some(p.stats.rx_errors)),
    ("usernic_rx_runts", "Frames of the other side that are shorter than an Ethernet header", |p| Some(p.stats.rx_runts)),
    ("usernic_rx_oversize", "Frames of the other side over the MTU of the port", |p| Some(p.stats.rx_oversize)),
    ("usernic_rx_filtered", "Frames that the receive filter kept out", |p| Some(p.stats.rx_filtered)),
    ("usernic_tx_filtered", "Frames that the receive filter of the other side kept out", |p| Some(p.stats.tx_filtered)),
    ("usernic_tx_oversize", "Frames for the port over its MTU", |p| Some(p.stats.tx_oversize)),
    ("usernic_tx_errors", "Frames that the other side can never take", |p| Some(p.stats.tx_errors)),
    ("usernic_rx_no_buffer", "Times that the pool had no buffer to receive into", |p| Some(p.stats.rx_no_buffer)),
    ("usernic_anomalies", "Violations of the protocol by the other side", |p| Some(p.stats.anomalies)),
    ("usernic_kicks", "Notifications sent", |p| Some(p.stats.kicks)),
    ("usernic_peers_refused", "Connections that were ended for what the other side did", |p| Some(p.stats.peers_refused)),
    ("usernic_switch_dropped", "Frames for the port that were dropped since it was full or down", |p| p.switch.map(|s| s[0])),
    ("usernic_switch_filtered", "Frames from the port that went nowhere", |p| p.switch.map(|s| s[1])),
    ("usernic_switch_flooded", "Frames from the port that were flooded", |p| p.switch.map(|s| s[2])),
    ("usernic_switch_copies", "Copies that were made of flooded frames from the port", |p| p.switch.map(|s| s[3])),
];

impl Collector for Metrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        for (name, help, value) in COUNTERS {
            if self.ports.iter().all(|port| value(port).is_none()) {
                continue;
            }
            let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
            for port in &self.ports {
                if let Some(value) = value(port) {
                    let labels = [("port", port.name.as_str())];
                    ConstCounter::new(value).encode(family.encode_family(&labels)?)?;
                }
            }
        }
        let mut family = encoder.encode_descriptor(
            "usernic_link_up",
            "1 if somebody is on the port and its rings run",
            None,
            MetricType::Gauge,
        )?;
        for port in &self.ports {
            let labels = [("port", port.name.as_str())];
            ConstGauge::new(i64::from(port.link_up)).encode(family.encode_family(&labels)?)?;
        }
        if let Some(addresses) = self.addresses {
            let what = "Addresses in the table";
            let gauge = encoder.encode_descriptor("usernic_switch_addresses", what, None, MetricType::Gauge)?;
            ConstGauge::new(addresses as i64).encode(gauge)?;
        }
        Ok(())
    }
}

/// The text.
pub fn render(metrics: Metrics) -> Result<String> {
    let mut registry = Registry::default();
    registry.register_collector(Box::new(metrics));
    let mut text = String::new();
    text::encode(&mut text, &registry)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_has_its_line() {
        let port = |name: &str, rx_packets, switch| PortMetrics {
            name: name.into(),
            link_up: rx_packets > 0,
            stats: Stats {
                rx_packets,
                ..Stats::default()
            },
            switch,
        };
        let text = render(Metrics {
            ports: vec![port("a", 7, Some([1, 2, 3, 4])), port("b \"quoted\"", 0, Some([0; 4]))],
            addresses: Some(5),
        })
        .unwrap();
        for line in [
            "# TYPE usernic_rx_packets counter",
            "usernic_rx_packets_total{port=\"a\"} 7",
            "usernic_switch_filtered_total{port=\"a\"} 2",
            "usernic_link_up{port=\"a\"} 1",
            "usernic_link_up{port=\"b \\\"quoted\\\"\"} 0",
            "usernic_switch_addresses 5",
            "# EOF",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in:\n{text}");
        }
        let alone = render(Metrics {
            ports: vec![port("a", 1, None)],
            addresses: None,
        })
        .unwrap();
        assert!(!alone.contains("switch"), "{alone}");
    }

    #[test]
    fn no_counter_of_a_port_is_left_out() {
        let text = render(Metrics {
            ports: vec![PortMetrics::default()],
            addresses: None,
        })
        .unwrap();
        let stats = serde_json::to_value(Stats::default()).unwrap();
        for name in stats.as_object().unwrap().keys() {
            assert!(
                text.contains(&format!("# TYPE usernic_{name} counter")),
                "{name} is not in:\n{text}"
            );
        }
    }
}
