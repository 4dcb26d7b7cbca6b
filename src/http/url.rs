//! What a URL and headers must be like before anything is sent.

use ureq::http::Uri;

/// The most bytes of a URL.
pub const MAX_URL: usize = 4_096;
/// The most bytes of all headers of a request, names included.
pub const MAX_HEADERS: usize = 16_384;

/// Headers that say how a request is carried: they are ours to write.
const CARRIER: &[&str] = &[
    "connection",
    "content-length",
    "expect",
    "host",
    "keep-alive",
    "proxy-authorization",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The URL if it may be sent to, else what is wrong with it, without a word of it.
///
/// # Errors
///
/// The fault as a sentence's end: "the URL …".
pub fn vet(url: &str, allow_http: bool) -> Result<Uri, &'static str> {
    if url.len() > MAX_URL {
        return Err("the URL has more than 4096 bytes");
    }
    if !url.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err("the URL holds blanks, control characters or letters beyond ASCII");
    }
    // Read differently by different programs.
    if url.contains(['\\', '<', '>', '"', '^', '`', '{', '|', '}']) {
        return Err("the URL holds characters that must be percent-encoded");
    }
    if url.contains('#') {
        return Err("the URL has a fragment");
    }
    let uri: Uri = url.parse().map_err(|_| "the URL is not valid")?;
    match uri.scheme_str() {
        Some("https") => (),
        Some("http") if allow_http => (),
        Some("http") => return Err("the URL is not https, and http is not allowed"),
        _ => return Err("the URL is not http or https"),
    }
    let authority = uri.authority().ok_or("the URL has no host")?;
    if authority.as_str().contains('@') {
        return Err("the URL holds credentials");
    }
    let host = uri.host().unwrap_or_default();
    if host.is_empty() || host == "." {
        return Err("the URL has no host");
    }
    // A colon with no port, or with one that is none, is not left to others to interpret.
    let after = &authority.as_str()[host.len()..];
    if !(after.is_empty() || uri.port_u16().is_some_and(|port| port != 0)) {
        return Err("the URL has no valid port");
    }
    Ok(uri)
}

/// Whether headers may be sent.
///
/// # Errors
///
/// What is wrong, with the name of the header at fault and never its value.
pub fn vet_headers<'a>(
    headers: impl IntoIterator<Item = (&'a str, &'a str)>,
) -> Result<(), String> {
    let mut size = 0;
    for (name, value) in headers {
        let shown: String = name
            .chars()
            .take(64)
            .filter(char::is_ascii_graphic)
            .collect();
        if name.is_empty() || !name.bytes().all(is_token) {
            return Err(format!("the name of header \"{shown}\" is not valid"));
        }
        if CARRIER.contains(&name.to_ascii_lowercase().as_str()) {
            return Err(format!("header \"{shown}\" must not be given"));
        }
        if !value
            .bytes()
            .all(|b| b == b'\t' || (b' '..0x7f).contains(&b))
        {
            return Err(format!(
                "the value of header \"{shown}\" holds control characters or letters beyond ASCII"
            ));
        }
        size += name.len() + value.len() + 4;
    }
    if size > MAX_HEADERS {
        return Err("the headers have more than 16384 bytes".to_owned());
    }
    Ok(())
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_that_are_plain_pass() {
        for url in [
            "https://example.com",
            "https://example.com:8443/a/b?c=d&e=%20",
            "https://[2606:4700::1111]:444/x",
            "HTTPS://EXAMPLE.com/",
        ] {
            assert!(vet(url, false).is_ok(), "{url}");
        }
        assert!(vet("http://example.com/", true).is_ok());
    }

    #[test]
    fn others_are_refused_and_nothing_of_them_is_said() {
        for url in [
            "",
            "example.com/s3cret",
            "/s3cret",
            "ftp://s3cret.example.com",
            "http://example.com/s3cret",
            "https://me:s3cret@example.com/",
            "https://s3cret@example.com",
            "https://example.com:/s3cret",
            "https://example.com:0/s3cret",
            "https://example.com:99999/s3cret",
            "https://example.com:80x/s3cret",
            "https:///s3cret",
            "https://exa mple.com/s3cret",
            "https://example.com/s3cret\r\nx: y",
            "https://example.com/s3cret\u{7f}",
            "https://exämple.com/s3cret",
            "https://example.com\\s3cret",
            "https://example.com/#s3cret",
            "https://[::1/s3cret",
            "file:///etc/s3cret",
            "javascript:s3cret",
        ] {
            let fault = vet(url, false).expect_err(url);
            assert!(!fault.contains("s3cret"), "{fault}");
        }
        assert!(
            vet(
                &format!("https://example.com/{}", "a".repeat(MAX_URL)),
                true
            )
            .is_err()
        );
    }

    #[test]
    fn headers_cannot_be_injected() {
        assert!(vet_headers([("x-a", "b c\td"), ("authorization", "Bearer s3cret")]).is_ok());
        for (name, value) in [
            ("", "v"),
            ("x a", "v"),
            ("x\r\nb", "v"),
            ("x:", "v"),
            ("x-a", "v\r\nx-b: s3cret"),
            ("x-a", "v\ns3cret"),
            ("x-a", "v\0s3cret"),
            ("x-a", "s3cret\u{e9}"),
            ("Host", "s3cret"),
            ("transfer-encoding", "s3cret"),
            ("Content-Length", "1"),
        ] {
            let fault = vet_headers([(name, value)]).expect_err(name);
            assert!(!fault.contains("s3cret"), "{fault}");
        }
        let huge = "v".repeat(MAX_HEADERS);
        assert!(vet_headers([("x-a", huge.as_str())]).is_err());
    }
}
