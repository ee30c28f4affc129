//! ADD's answer (CNI 1.1, "ADD Success"): the result of the plugin before, with our interface and our addresses.

use std::path::Path;

use serde_json::{Map, Value, json};
use usernic::auto::PortConfig;

use super::config::{Config, OldAddress, Previous};

/// The answer, in the configuration's version. A runtime may hand on a result of another version: addresses get, or lose,
/// what has changed.
pub fn of(config: &Config, netns: &str, port: &PortConfig, given: &Value, socket: &Path) -> Value {
    let version = config.cni_version.as_str();
    let Previous {
        mut interfaces,
        mut ips,
        mut routes,
        ip4,
        ip6,
        others: mut result,
    } = config.prev_result.clone();
    for OldAddress {
        ip,
        gateway,
        routes: more,
    } in [ip4, ip6].into_iter().flatten()
    {
        let mut address = object(json!({ "address": ip }));
        if let Some(gateway) = gateway {
            address.insert("gateway".into(), gateway.into());
        }
        ips.push(address);
        routes.extend(more);
    }
    let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
    for mut ip in list(&given["ips"]).into_iter().map(object) {
        ip.insert("interface".into(), interfaces.len().into());
        ips.push(ip);
    }
    for ip in &mut ips {
        // Until 1.0.0 an address says which version of IP it is of.
        ip.remove("version");
        if version.starts_with("0.") {
            let six = ip
                .get("address")
                .and_then(Value::as_str)
                .is_some_and(|a| a.contains(':'));
            ip.insert("version".into(), if six { "6" } else { "4" }.into());
        }
    }
    let mut interface = json!({ "name": port.interface, "mac": port.mac, "sandbox": netns });
    if version == "1.1.0" {
        interface["socketPath"] = json!(socket);
        if let Some(mtu) = port.mtu {
            interface["mtu"] = mtu.into();
        }
    }
    interfaces.push(object(interface));
    routes.extend(list(&given["routes"]));
    result.insert("cniVersion".into(), version.into());
    result.insert("interfaces".into(), json!(interfaces));
    result.insert("ips".into(), json!(ips));
    result.insert("routes".into(), json!(routes));
    let dns = [result.get("dns"), given.get("dns")];
    let dns = dns.into_iter().flatten().find(|dns| dns.is_object()).cloned();
    result.insert("dns".into(), dns.unwrap_or_else(|| json!({})));
    result.into()
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(version: &str, previous: &str, given: &Value) -> Value {
        let text = format!(r#"{{"cniVersion":"{version}","name":"a","prevResult":{previous}}}"#);
        let config = Config::read(text.as_bytes()).unwrap();
        let port = r#"{"schema":"usernic.port/1","interface":"net1","network":"a","path":"sock","mtu":1400}"#;
        of(
            &config,
            "/ns",
            &serde_json::from_str(port).unwrap(),
            given,
            Path::new("/s"),
        )
    }

    #[test]
    fn results_of_other_versions_are_brought_into_this_one() {
        let new =
            r#"{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"192.0.2.1/24","interface":0}]}"#;
        let old = r#"{"cniVersion":"0.4.0","interfaces":[{"name":"eth0"}],
            "ips":[{"version":"4","address":"192.0.2.1/24","interface":0}],"dns":{"nameservers":["192.0.2.9"]}}"#;
        let oldest = r#"{"cniVersion":"0.2.0","ip4":{"ip":"192.0.2.1/24","gateway":"192.0.2.254",
            "routes":[{"dst":"0.0.0.0/0"}]},"ip6":{"ip":"2001:db8::1/64"},"dns":{}}"#;
        let given = json!({ "ips": [{ "address": "2001:db8::2/64" }], "routes": [{ "dst": "::/0" }] });
        for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
            for previous in [new, old] {
                let result = answer(version, previous, &given);
                assert_eq!(result["cniVersion"], version);
                let six = version.starts_with("0.").then_some("6");
                assert_eq!(result["ips"][1]["version"].as_str(), six, "{result}");
                assert_eq!(result["ips"][0]["version"].as_str(), six.map(|_| "4"), "{result}");
                assert_eq!(
                    (&result["ips"][0]["interface"], &result["ips"][1]["interface"]),
                    (&json!(0), &json!(1))
                );
                assert_eq!(result["interfaces"][1]["socketPath"].is_string(), version == "1.1.0");
            }
            let result = answer(version, oldest, &given);
            assert_eq!(result["ips"][0]["address"], "192.0.2.1/24", "{result}");
            assert_eq!(result["ips"][0]["gateway"], "192.0.2.254");
            assert_eq!(result["ips"][1]["address"], "2001:db8::1/64");
            assert_eq!(result["routes"], json!([{ "dst": "0.0.0.0/0" }, { "dst": "::/0" }]));
            assert!(result["ip4"].is_null() && result["ip6"].is_null());
        }
        assert_eq!(answer("1.0.0", old, &given)["dns"]["nameservers"][0], "192.0.2.9");
        assert_eq!(answer("1.0.0", "null", &json!({}))["dns"], json!({}));
    }
}
