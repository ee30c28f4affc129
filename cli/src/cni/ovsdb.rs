//! Ports of Open vSwitch, by its database: JSON-RPC on a Unix socket (RFC 7047).

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::backend::is_late;
use super::config::{Attached, Attachment, Config};

/// How long the database may take to answer, and the switch to do what the database says.
const LIMIT: Duration = Duration::from_secs(10);

/// Whose a port is, in `external_ids` of its interface.
const NETWORK: &str = "usernic-network";
const CONTAINER: &str = "usernic-container";
const INTERFACE: &str = "usernic-interface";

/// A connection to the database.
pub struct Ovsdb {
    stream: UnixStream,
    /// What came behind the last answer.
    held: Vec<u8>,
    calls: u64,
}

/// The name of an attachment's port: as short as names of interfaces are.
fn name(attachment: &Attachment) -> String {
    format!("u{:014x}", attachment.number())
}

/// `["map", [[key, value], ...]]` (5.1).
fn map(pairs: &[(&str, &str)]) -> Value {
    json!([
        "map",
        pairs.iter().map(|(key, value)| json!([key, value])).collect::<Vec<_>>()
    ])
}

fn ids(attachment: &Attachment) -> Value {
    map(&[
        (NETWORK, &attachment.network),
        (CONTAINER, &attachment.to.container),
        (INTERFACE, &attachment.to.interface),
    ])
}

/// A value of a map.
fn entry<'a>(map: &'a Value, key: &str) -> Option<&'a str> {
    let pairs = map.get(1)?.as_array()?;
    pairs.iter().find(|pair| pair[0] == key)?[1].as_str()
}

impl Ovsdb {
    /// Connects.
    pub fn connect(path: &Path) -> Result<Self> {
        let stream = crate::control::connect(path)
            .with_context(|| format!("cannot connect to OVS' database at {}: does it run?", path.display()))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(Ovsdb {
            stream,
            held: Vec::new(),
            calls: 0,
        })
    }

    /// The group that the database runs as, which is the switch's.
    pub fn group(&self) -> Result<u32> {
        Ok(rustix::net::sockopt::socket_peercred(&self.stream)?.gid.as_raw())
    }

    /// Does all of `operations` or nothing (4.1.3); a result for each.
    fn transact(&mut self, operations: &[Value]) -> Result<Vec<Value>> {
        self.calls += 1;
        let mut parameters = vec![json!("Open_vSwitch")];
        parameters.extend(operations.iter().cloned());
        let request = json!({ "method": "transact", "params": parameters, "id": self.calls });
        self.stream
            .write_all(request.to_string().as_bytes())
            .context("writing to OVS' database")?;
        let mut answer = loop {
            let message = self.message()?;
            if message["method"] == "echo" {
                // It asks whether we are alive (4.1.11).
                let answer = json!({ "result": message["params"], "error": null, "id": message["id"] });
                self.stream.write_all(answer.to_string().as_bytes())?;
            } else if message["id"] == self.calls {
                break message;
            }
        };
        if !answer["error"].is_null() {
            bail!("OVS' database: {}", answer["error"]);
        }
        let Value::Array(results) = answer["result"].take() else {
            bail!("OVS' database answered without a result");
        };
        if let Some(error) = results.iter().find(|result| !result["error"].is_null()) {
            bail!("OVS' database: {} ({})", error["error"], error["details"]);
        }
        if results.len() < operations.len() {
            bail!(
                "OVS' database answered {} of {} operations",
                results.len(),
                operations.len()
            );
        }
        Ok(results)
    }

    fn message(&mut self) -> Result<Value> {
        /// More than any answer to what is asked here.
        const MOST: usize = 16 << 20;
        loop {
            if is_late() {
                bail!("OVS' database took too long");
            }
            let mut values = serde_json::Deserializer::from_slice(&self.held).into_iter::<Value>();
            match values.next() {
                Some(Ok(value)) => {
                    let end = values.byte_offset();
                    self.held.drain(..end);
                    return Ok(value);
                }
                Some(Err(error)) if !error.is_eof() => bail!("OVS' database sent no JSON: {error}"),
                _ => {}
            }
            let mut part = [0; 16 << 10];
            match self.stream.read(&mut part).context("reading from OVS' database")? {
                0 => bail!("OVS' database hung up"),
                _ if self.held.len() > MOST => bail!("OVS' database sent more than {MOST} bytes"),
                n => self.held.extend_from_slice(&part[..n]),
            }
        }
    }

    /// The interface of an attachment, if it is there.
    fn find(&mut self, attachment: &Attachment) -> Result<Option<Value>> {
        let name = name(attachment);
        let results = self.transact(&[json!({
            "op": "select", "table": "Interface", "where": [["name", "==", name]],
            "columns": ["external_ids", "type", "options", "ofport", "error"],
        })])?;
        let Some(row) = results[0]["rows"].get(0) else {
            return Ok(None);
        };
        if whose(row).as_ref() != Some(attachment) {
            bail!(
                "there is an interface {name} in OVS that is not of {}",
                attachment.switch_name()
            );
        }
        Ok(Some(row.clone()))
    }

    /// Whether the attachment has its port.
    pub fn has(&mut self, attachment: &Attachment) -> Result<bool> {
        Ok(self.find(attachment)?.is_some())
    }

    /// Makes the port, unless it is there; OVS connects to `socket`, where the container listens.
    pub fn add(&mut self, config: &Config, attachment: &Attachment, socket: &Path) -> Result<()> {
        let socket = socket.to_str().context("a path that is no Unicode")?;
        let found = self.find(attachment)?;
        let same = |row: &Value| entry(&row["options"], "vhost-server-path") == Some(socket);
        if found.as_ref().is_some_and(|row| !same(row)) {
            self.remove(attachment)?;
        }
        if !found.as_ref().is_some_and(same) {
            self.insert(config, attachment, socket)?;
        }
        self.settled(attachment)
    }

    fn insert(&mut self, config: &Config, attachment: &Attachment, socket: &str) -> Result<()> {
        let name = name(attachment);
        let mut interface = json!({
            "name": name,
            "type": "dpdkvhostuserclient",
            "options": map(&[("vhost-server-path", socket)]),
            "external_ids": ids(attachment),
        });
        if let Some(mtu) = config.mtu {
            interface["mtu_request"] = mtu.into();
        }
        let mut port =
            json!({ "name": name, "interfaces": ["named-uuid", "interface"], "external_ids": ids(attachment) });
        if let Some(vlan) = config.vlan {
            port["tag"] = vlan.into();
        }
        let bridge = json!([["name", "==", config.bridge]]);
        self.transact(&[
            // Nothing is done if there is no such bridge.
            json!({ "op": "wait", "timeout": 0, "table": "Bridge", "where": bridge, "columns": ["name"], "until": "==",
                "rows": [{ "name": config.bridge }] }),
            json!({ "op": "insert", "table": "Interface", "row": interface, "uuid-name": "interface" }),
            json!({ "op": "insert", "table": "Port", "row": port, "uuid-name": "port" }),
            json!({ "op": "mutate", "table": "Bridge", "where": bridge,
                "mutations": [["ports", "insert", ["named-uuid", "port"]]] }),
        ])
        .with_context(|| format!("adding a port to bridge {}", config.bridge))
        .map(drop)
    }

    /// Waits until the switch has made the port, or said why not.
    fn settled(&mut self, attachment: &Attachment) -> Result<()> {
        let end = Instant::now() + LIMIT;
        loop {
            let row = self
                .find(attachment)?
                .context("the port was removed by somebody else")?;
            if let Some(error) = row["error"].as_str().filter(|text| !text.is_empty()) {
                bail!("OVS cannot make the port: {error}");
            }
            if row["ofport"].as_i64().is_some_and(|number| number > 0) {
                return Ok(());
            }
            if Instant::now() > end || is_late() {
                bail!("OVS did not make the port within {LIMIT:?}: does ovs-vswitchd run?");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Removes the port; whether there was one.
    pub fn remove(&mut self, attachment: &Attachment) -> Result<bool> {
        if self.find(attachment)?.is_none() {
            return Ok(false);
        }
        let name = name(attachment);
        let ports = self.transact(&[json!({
            "op": "select", "table": "Port", "where": [["name", "==", name]], "columns": ["_uuid"],
        })])?;
        let Some(port) = ports[0]["rows"].get(0).map(|row| row["_uuid"].clone()) else {
            return Ok(false);
        };
        // Nothing else refers to port and interface: they go with the last reference (RFC 7047, 3.2, isRoot).
        self.transact(&[json!({
            "op": "mutate", "table": "Bridge", "where": [["ports", "includes", port]],
            "mutations": [["ports", "delete", port]],
        })])?;
        Ok(true)
    }

    /// Who has ports of a network.
    pub fn list(&mut self, network: &str) -> Result<Vec<Attachment>> {
        let results = self.transact(&[json!({
            "op": "select", "table": "Interface", "columns": ["external_ids"],
            "where": [["external_ids", "includes", map(&[(NETWORK, network)])]],
        })])?;
        let rows = results[0]["rows"].as_array().cloned().unwrap_or_default();
        Ok(rows.iter().filter_map(whose).collect())
    }

    /// Whether the bridge is there.
    pub fn check(&mut self, bridge: &str) -> Result<()> {
        let results = self.transact(&[json!({
            "op": "select", "table": "Bridge", "where": [["name", "==", bridge]], "columns": ["datapath_type"],
        })])?;
        match results[0]["rows"].get(0) {
            None => bail!("OVS has no bridge {bridge}"),
            Some(row) if row["datapath_type"] != "netdev" => {
                bail!("bridge {bridge} of OVS has no datapath_type=netdev")
            }
            Some(_) => Ok(()),
        }
    }
}

fn whose(row: &Value) -> Option<Attachment> {
    let id = |key| entry(&row["external_ids"], key).map(str::to_owned);
    Some(Attachment {
        network: id(NETWORK)?,
        to: Attached {
            container: id(CONTAINER)?,
            interface: id(INTERFACE)?,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    /// A database that says these things, and hangs up.
    fn database(says: &[&str]) -> (tempfile::TempDir, Ovsdb) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        let listener = UnixListener::bind(&path).unwrap();
        let says: Vec<String> = says.iter().map(|text| text.to_string()).collect();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            for text in says {
                let _ = stream.write_all(text.as_bytes());
                std::thread::sleep(Duration::from_millis(5));
            }
            // Until the other side has read and gone.
            let _ = stream.shutdown(std::net::Shutdown::Write);
            let _ = stream.read_to_end(&mut Vec::new());
        });
        let ovsdb = Ovsdb::connect(&path).unwrap();
        (dir, ovsdb)
    }

    #[test]
    fn answers_come_in_pieces_and_among_others() {
        let echo = r#"{"method":"echo","params":[],"id":"echo"}"#;
        let other = r#"{"id":99,"result":[{}],"error":null}"#;
        let (_dir, mut ovsdb) = database(&[
            echo,
            other,
            r#"{"id":1,"result":[{"rows":[{"datapath_"#,
            r#"type":"netdev"}]}],"error":null}"#,
        ]);
        ovsdb.check("br0").unwrap();
    }

    #[test]
    fn what_went_wrong_is_told() {
        for (says, what) in [
            (r#"{"id":1,"result":[{"rows":[]}],"error":null}"#, "no bridge br0"),
            (
                r#"{"id":1,"result":[{"rows":[{"datapath_type":""}]}],"error":null}"#,
                "netdev",
            ),
            (
                r#"{"id":1,"result":[{"error":"timed out","details":"x"}],"error":null}"#,
                "timed out",
            ),
            (r#"{"id":1,"result":[],"error":null}"#, "0 of 1"),
            (
                r#"{"id":1,"result":null,"error":"unknown database"}"#,
                "unknown database",
            ),
            (r#"{"id":1,"error":null}"#, "without a result"),
            ("nonsense", "no JSON"),
            (r#"{"id":1,"#, "hung up"),
        ] {
            let (_dir, mut ovsdb) = database(&[says]);
            let error = format!("{:#}", ovsdb.check("br0").unwrap_err());
            assert!(error.contains(what), "{says}: {error}");
        }
    }
}
