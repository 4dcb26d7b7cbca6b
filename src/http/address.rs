//! Which addresses may be connected to: those that are of the public internet.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::thread;

use ureq::Error;
use ureq::config::Config;
use ureq::http::Uri;
use ureq::unversioned::resolver::{ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::NextTimeout;

/// What an address that may not be connected to is; none if it may.
pub fn fault(address: IpAddr) -> Option<&'static str> {
    match address {
        IpAddr::V4(address) => fault_v4(address),
        IpAddr::V6(address) => fault_v6(address),
    }
}

fn fault_v4(address: Ipv4Addr) -> Option<&'static str> {
    let [a, b, c, _] = address.octets();
    match (a, b, c) {
        (0, ..) => Some("unspecified"),
        (127, ..) => Some("loopback"),
        (10, ..) | (172, 16..=31, _) | (192, 168, _) => Some("private"),
        (169, 254, _) => Some("link-local"),
        (100, 64..=127, _) => Some("shared between a provider's customers"),
        (224..=239, ..) => Some("multicast"),
        // IETF protocols, 6to4 relays, benchmarks, documentation, what is reserved, broadcast.
        (192, 0, 0 | 2)
        | (192, 88, 99)
        | (198, 18..=19, _)
        | (198, 51, 100)
        | (203, 0, 113)
        | (240..=255, ..) => Some("reserved"),
        _ => None,
    }
}

fn fault_v6(address: Ipv6Addr) -> Option<&'static str> {
    let s = address.segments();
    let v4 = |high: u16, low: u16| {
        let [a, b] = high.to_be_bytes();
        let [c, d] = low.to_be_bytes();
        fault_v4(Ipv4Addr::new(a, b, c, d))
    };
    match s {
        [0, 0, 0, 0, 0, 0, 0, 0] => Some("unspecified"),
        [0, 0, 0, 0, 0, 0, 0, 1] => Some("loopback"),
        // An IPv4 address in another dress: mapped, compatible, translated, NAT64, 6to4.
        [0, 0, 0, 0, 0, 0xffff | 0, high, low] | [0, 0, 0, 0, 0xffff, 0, high, low] => {
            v4(high, low).or(Some("an IPv4 address written as IPv6"))
        }
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => v4(high, low),
        // A translator of somebody's own: what it translates to is not known here.
        [0x64, 0xff9b, ..] => Some("private"),
        [0x2002, high, low, ..] => v4(high, low),
        [0x2001, 0..=0x1ff, ..] => Some("reserved"),
        [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] | [0x100, ..] => Some("reserved"),
        [0xfc00..=0xfdff, ..] => Some("unique local"),
        [0xfe80..=0xfebf, ..] => Some("link-local"),
        [0xfec0..=0xfeff, ..] => Some("site-local"),
        [0xff00..=0xffff, ..] => Some("multicast"),
        // All that is given out is in 2000::/3.
        [0x2000..=0x3fff, ..] => None,
        _ => Some("reserved"),
    }
}

/// Why nothing was connected to.
#[derive(Debug)]
pub struct RefusedAddress {
    address: IpAddr,
    fault: &'static str,
}

impl fmt::Display for RefusedAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the address {} is {} and not allowed",
            self.address, self.fault
        )
    }
}

impl std::error::Error for RefusedAddress {}

/// Finds a name's addresses: in tests another one than the system's.
pub type Lookup = Arc<dyn Fn(&str, u16) -> std::io::Result<Vec<SocketAddr>> + Send + Sync>;

/// The system's.
pub fn system_lookup() -> Lookup {
    Arc::new(|host, port| Ok((host, port).to_socket_addrs()?.collect()))
}

/// A resolver that gives only addresses that may be connected to. Who connects uses these
/// and asks for the name no second time: so a name that changes its addresses gains nothing.
pub struct Vetted {
    lookup: Lookup,
    allow_private: bool,
}

impl Vetted {
    /// A resolver by `lookup`.
    pub fn new(lookup: Lookup, allow_private: bool) -> Self {
        Self {
            lookup,
            allow_private,
        }
    }
}

impl fmt::Debug for Vetted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vetted")
            .field("allow_private", &self.allow_private)
            .finish_non_exhaustive()
    }
}

impl Resolver for Vetted {
    fn resolve(
        &self,
        uri: &Uri,
        _: &Config,
        timeout: NextTimeout,
    ) -> Result<ResolvedSocketAddrs, Error> {
        let host = uri.host().ok_or(Error::HostNotFound)?;
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let default = if uri.scheme_str() == Some("https") {
            443
        } else {
            80
        };
        let port = uri.port_u16().unwrap_or(default);

        let found = match host.parse::<IpAddr>() {
            Ok(address) => vec![SocketAddr::new(address, port)],
            Err(_) => self.look_up(host.to_owned(), port, timeout)?,
        };
        let mut result = self.empty();
        let mut refused = None;
        for address in found {
            match fault(address.ip()) {
                Some(fault) if !self.allow_private => {
                    refused.get_or_insert(RefusedAddress {
                        address: address.ip(),
                        fault,
                    });
                }
                // ureq keeps no more than that many.
                _ if result.len() < 16 => result.push(address),
                _ => (),
            }
        }
        match refused {
            _ if !result.is_empty() => Ok(result),
            Some(refused) => Err(Error::Other(Box::new(refused))),
            None => Err(Error::HostNotFound),
        }
    }
}

impl Vetted {
    /// In a thread, as the system may take longer than there is time.
    fn look_up(
        &self,
        host: String,
        port: u16,
        timeout: NextTimeout,
    ) -> Result<Vec<SocketAddr>, Error> {
        let lookup = Arc::clone(&self.lookup);
        let (tell, told) = mpsc::sync_channel(1);
        thread::Builder::new()
            .name("lookup".to_owned())
            .spawn(move || tell.send(lookup(&host, port)).ok())
            .map_err(Error::Io)?;
        match told.recv_timeout(*timeout.after) {
            Ok(found) => found.map_err(|_| Error::HostNotFound),
            Err(mpsc::RecvTimeoutError::Timeout) => Err(Error::Timeout(timeout.reason)),
            Err(mpsc::RecvTimeoutError::Disconnected) => Err(Error::HostNotFound),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_the_inside_are_told_from_those_of_the_internet() {
        for inside in [
            "0.0.0.0",
            "0.1.2.3",
            "10.0.0.1",
            "100.64.0.1",
            "100.127.255.255",
            "127.0.0.1",
            "127.255.0.9",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.0.8",
            "192.0.2.1",
            "192.88.99.1",
            "192.168.1.1",
            "198.18.0.1",
            "198.19.255.255",
            "198.51.100.7",
            "203.0.113.9",
            "224.0.0.1",
            "239.255.255.250",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "::127.0.0.1",
            "::8.8.8.8",
            "::ffff:10.0.0.1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::ffff:0:10.0.0.1",
            "64:ff9b::10.0.0.1",
            "64:ff9b::169.254.169.254",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:db8::1",
            "2001:10::1",
            "2002:7f00:1::",
            "2002:c0a8:101::1",
            "3fff::1",
            "fc00::1",
            "fd12:3456::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "4000::1",
            "5f00::1",
        ] {
            let address = inside.parse().expect("an address");
            assert!(fault(address).is_some(), "{inside}");
        }
        for public in [
            "1.1.1.1",
            "8.8.8.8",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.0.1",
            "172.32.0.1",
            "192.167.1.1",
            "192.169.0.1",
            "223.255.255.255",
            "2606:4700::1111",
            "2a00:1450:4001::1",
            "64:ff9b::8.8.8.8",
            "2002:808:808::1",
            "2001:4860:4860::8888",
        ] {
            let address = public.parse().expect("an address");
            assert_eq!(fault(address), None, "{public}");
        }
    }
}
