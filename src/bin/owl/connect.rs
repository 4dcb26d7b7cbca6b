//! Connects to a database by a URL, with TLS as libpq does it.

use postgres::config::{Host, SslMode};
use postgres::{Client, Config, NoTls, SimpleQueryMessage};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, Error, RootCertStore, SignatureScheme,
};
use std::sync::Arc;
use std::time::Duration;
use tokio_postgres_rustls::MakeRustlsConnect;

/// Where the system keeps the authorities it trusts.
const SYSTEM_ROOTS: &[&str] = &[
    "/etc/ssl/certs/ca-certificates.crt",
    "/etc/pki/tls/certs/ca-bundle.crt",
    "/etc/ssl/cert.pem",
];

/// A database to connect to, again and again.
pub struct Target {
    config: Config,
    tls: Option<MakeRustlsConnect>,
}

/// A row, each column as text.
pub type Row = Vec<Option<String>>;

impl Target {
    /// From a URL, or from `key=value` words; what it leaves out comes from `PGHOST`, `PGPORT`, `PGDATABASE`, `PGUSER` and `PGPASSWORD`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let parameters = Parameters::taken_from(text);
        let mut config: Config = parameters.rest.parse().map_err(|error: postgres::Error| {
            format!("this is no connection string: {}", said(&error))
        })?;
        let variable = |name| std::env::var(name).ok().filter(|value| !value.is_empty());
        if config.get_hosts().is_empty() && config.get_hostaddrs().is_empty() {
            match variable("PGHOST") {
                Some(host) => config.host(&host),
                None => config.host("/var/run/postgresql"),
            };
        }
        if config.get_ports().is_empty()
            && let Some(port) = variable("PGPORT")
        {
            config.port(port.parse().map_err(|_| "PGPORT is no port".to_owned())?);
        }
        if config.get_user().is_none()
            && let Some(user) = variable("PGUSER")
        {
            config.user(&user);
        }
        if config.get_dbname().is_none()
            && let Some(database) = variable("PGDATABASE")
        {
            config.dbname(&database);
        }
        if config.get_password().is_none()
            && let Some(password) = variable("PGPASSWORD")
        {
            config.password(password);
        }
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_secs(10));
        }
        if config.get_application_name().is_none() {
            config.application_name("owl");
        }
        let tls = parameters.tls(&mut config)?;
        Ok(Target { config, tls })
    }

    /// A session of its own.
    pub fn connect(&self) -> Result<Client, String> {
        match &self.tls {
            Some(tls) => self.config.connect(tls.clone()),
            None => self.config.connect(NoTls),
        }
        .map_err(|error| format!("cannot connect: {}", said(&error)))
    }

    /// What may be shown of it: `database at host`.
    pub fn shown(&self) -> String {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(host)) => host.clone(),
            Some(Host::Unix(_)) | None => "local".to_owned(),
        };
        match self.config.get_dbname() {
            Some(database) => format!("{database} at {host}"),
            None => host,
        }
    }
}

/// Every row of `sql`, by the simple protocol, which every pooler lets through.
pub fn rows(client: &mut Client, sql: &str) -> Result<Vec<Row>, String> {
    let messages = client.simple_query(sql).map_err(|error| {
        match error.code().map(postgres::error::SqlState::code) {
            Some("3F000" | "42883" | "42P01") => {
                format!("is nightowls installed in this database? {}", said(&error))
            }
            _ => said(&error),
        }
    })?;
    Ok(messages
        .into_iter()
        .filter_map(|message| match message {
            SimpleQueryMessage::Row(row) => Some(
                (0..row.len())
                    .map(|column| row.get(column).map(str::to_owned))
                    .collect(),
            ),
            _ => None,
        })
        .collect())
}

/// An error as the server said it, with its hint.
fn said(error: &postgres::Error) -> String {
    match error.as_db_error() {
        Some(refused) => match refused.hint() {
            Some(hint) => format!("{} ({hint})", refused.message()),
            None => refused.message().to_owned(),
        },
        None => {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                let more = cause.to_string();
                if !text.contains(&more) {
                    text = format!("{text}: {more}");
                }
                source = cause.source();
            }
            text
        }
    }
}

/// What libpq knows of TLS and the `postgres` crate does not.
struct Parameters {
    rest: String,
    mode: Option<String>,
    roots: Option<String>,
}

impl Parameters {
    fn taken_from(text: &str) -> Self {
        let is_url = text.contains("://");
        let (address, words): (&str, Vec<&str>) = match text.split_once('?').filter(|_| is_url) {
            Some((address, query)) => (address, query.split('&').collect()),
            None if is_url => (text, Vec::new()),
            None => ("", text.split_whitespace().collect()),
        };
        let (mut mode, mut roots, mut kept) = (None, None, Vec::new());
        for word in words {
            match word.split_once('=') {
                Some(("sslmode", value)) => mode = Some(decoded(value)),
                Some(("sslrootcert", value)) => roots = Some(decoded(value)),
                _ => kept.push(word),
            }
        }
        let rest = match (is_url, kept.is_empty()) {
            (true, true) => address.to_owned(),
            (true, false) => format!("{address}?{}", kept.join("&")),
            (false, _) => kept.join(" "),
        };
        Parameters { rest, mode, roots }
    }

    fn tls(&self, config: &mut Config) -> Result<Option<MakeRustlsConnect>, String> {
        let mode = match &self.mode {
            Some(mode) => mode.clone(),
            None => std::env::var("PGSSLMODE").unwrap_or_else(|_| "prefer".to_owned()),
        };
        let verified = match mode.as_str() {
            "disable" => {
                config.ssl_mode(SslMode::Disable);
                return Ok(None);
            }
            "allow" | "prefer" | "" => {
                config.ssl_mode(SslMode::Prefer);
                None
            }
            "require" => {
                config.ssl_mode(SslMode::Require);
                // As libpq: an authority that is named is looked at.
                self.roots.as_ref().map(|_| false)
            }
            "verify-ca" | "verify-full" => {
                config.ssl_mode(SslMode::Require);
                Some(mode == "verify-full")
            }
            _ => return Err(format!("there is no sslmode \"{mode}\"")),
        };
        let provider = Arc::new(ring::default_provider());
        let known = verified.map(|names| Ok::<_, String>((self.verifier(&provider)?, names)));
        let verifier = Verifier {
            known: known.transpose()?,
            provider: Arc::clone(&provider),
        };
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| error.to_string())?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        Ok(Some(MakeRustlsConnect::new(client)))
    }

    fn verifier(
        &self,
        provider: &Arc<CryptoProvider>,
    ) -> Result<Arc<WebPkiServerVerifier>, String> {
        let system = || {
            SYSTEM_ROOTS
                .iter()
                .find(|path| std::path::Path::new(path).exists())
        };
        let path = match self.roots.as_deref() {
            Some("system") | None => {
                (*system().ok_or("no authorities found: name a file with sslrootcert")?).to_owned()
            }
            Some(path) => path.to_owned(),
        };
        let mut roots = RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(&path)
            .map_err(|error| format!("cannot read \"{path}\": {error}"))?;
        for certificate in certificates {
            let certificate = certificate.map_err(|error| format!("\"{path}\": {error}"))?;
            // A system has some that nobody can read.
            let _ = roots.add(certificate);
        }
        WebPkiServerVerifier::builder_with_provider(Arc::new(roots), Arc::clone(provider))
            .build()
            .map_err(|error| format!("\"{path}\": {error}"))
    }
}

/// Without its percent signs.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let byte = match after {
            [high, low, ..] if *first == b'%' => {
                let digit = |byte: &u8| char::from(*byte).to_digit(16);
                digit(high).zip(digit(low))
            }
            _ => None,
        };
        match byte.and_then(|(high, low)| u8::try_from(high * 16 + low).ok()) {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Takes any certificate, or, where there are authorities, theirs only: of this host (`true`) or of any.
#[derive(Debug)]
struct Verifier {
    known: Option<(Arc<WebPkiServerVerifier>, bool)>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some((known, names)) = &self.known else {
            return Ok(ServerCertVerified::assertion());
        };
        match known.verify_server_cert(certificate, others, name, ocsp, now) {
            Err(Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) if !names => Ok(ServerCertVerified::assertion()),
            other => other,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signed, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signed, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_libpq_knows_of_tls_is_taken_out() {
        for (text, rest, mode, roots) in [
            (
                "postgres://a@h/d?sslmode=verify-full&sslrootcert=%2Fx%20y.pem&application_name=z",
                "postgres://a@h/d?application_name=z",
                Some("verify-full"),
                Some("/x y.pem"),
            ),
            (
                "postgres://a@h/d?sslmode=disable",
                "postgres://a@h/d",
                Some("disable"),
                None,
            ),
            ("postgres://a@h/d", "postgres://a@h/d", None, None),
            (
                "host=h sslmode=require dbname=d",
                "host=h dbname=d",
                Some("require"),
                None,
            ),
        ] {
            let taken = Parameters::taken_from(text);
            assert_eq!(taken.rest, rest);
            assert_eq!(taken.mode.as_deref(), mode);
            assert_eq!(taken.roots.as_deref(), roots);
        }
    }

    #[test]
    fn a_password_is_never_shown() {
        let target = Target::parse("postgres://me:secret@host.example/base?sslmode=require").ok();
        assert_eq!(
            target.map(|target| target.shown()).as_deref(),
            Some("base at host.example")
        );
        for text in [
            "postgres://me:secret@host/base?sslmode=nonsense",
            "postgres://me:secret@host:x/base",
            "postgres://me:secret@host/base?no=such",
        ] {
            let said = Target::parse(text).err().unwrap_or_default();
            assert!(!said.is_empty() && !said.contains("secret"), "{said}");
        }
    }
}
