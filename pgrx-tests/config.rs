//! Configuration: values for one org or for all, and secrets that only services read.

use crate::fixture::{as_user, default_org, lines, together};
use crate::members::two_orgs;
use crate::projections::text;
use crate::support::{MEMBER, on_each_install, on_each_route};

/// What a Vault offers, as far as we use it; it keeps secrets in the clear.
const VAULT: &str = "create schema vault;
  create table vault.secrets (id uuid primary key default gen_random_uuid(), name text unique, description text, secret text not null);
  create view vault.decrypted_secrets as select id, name, description, secret as decrypted_secret from vault.secrets;
  create function vault.create_secret(new_secret text, new_name text default null, new_description text default '', new_key_id uuid default null)
    returns uuid language sql security definer set search_path = '' as $$
      insert into vault.secrets (secret, name, description) values (new_secret, new_name, new_description) returning id $$;
  create function vault.update_secret(secret_id uuid, new_secret text default null, new_name text default null, new_description text default null, new_key_id uuid default null)
    returns void language sql security definer set search_path = '' as $$ update vault.secrets set secret = coalesce(new_secret, secret) where id = secret_id $$;
  revoke all on function vault.create_secret, vault.update_secret from public";

#[test]
fn an_org_has_its_own_value_or_the_one_for_all() {
    on_each_route(|db| {
        let (_, other) = two_orgs(db);
        let mut service = db.service();
        service.exec("select nightowls.set_config_value('region', 'eu'), nightowls.set_config_value('region', 'us', for_all => true), nightowls.set_config_value('shared', 'ünï 🦉', for_all => true)");
        for (sql, answer) in [
            (
                "select nightowls.get_config_value('region')".to_owned(),
                "eu",
            ),
            (
                format!("select nightowls.get_config_value('region', '{other}')"),
                "us",
            ),
            (
                "select nightowls.get_config_value('shared')".to_owned(),
                "ünï 🦉",
            ),
            (
                "select nightowls.get_config_value('none') is null".to_owned(),
                "t",
            ),
            (
                "select nightowls.set_config_value('region', null)::text".to_owned(),
                "",
            ),
            (
                "select nightowls.get_config_value('region')".to_owned(),
                "us",
            ),
        ] {
            assert_eq!(text(&mut service, &sql), answer, "{sql}");
        }
        for (sql, code) in [
            (
                "select nightowls.set_config_value('key', E'ends with a break\\n')",
                "22023",
            ),
            (
                "select nightowls.set_config_value('key', E'\\x7f', true)",
                "22023",
            ),
            ("select nightowls.set_config_value(E'k\\t', 'x')", "22023"),
            ("select nightowls.set_config_value('', 'x')", "22023"),
            ("select nightowls.set_config_value(null, 'x')", "22004"),
            ("select nightowls.set_config_value('k', 'x', null)", "22004"),
            (
                "select nightowls.set_config_value('k', repeat('x', 65537))",
                "54000",
            ),
            (
                "select nightowls.set_config_value('k', 'x', org => '00000000-0000-4000-8000-00000000dead')",
                "22023",
            ),
            ("select nightowls.get_config_value(null)", "22004"),
            ("select * from nightowls._config_secrets", "42501"),
        ] {
            let refusal = service.refused(sql);
            assert_eq!(refusal.code, code, "{sql}: {refusal}");
            assert!(!refusal.message.contains("ends with"), "{refusal}");
        }
        // Values set at the same moment are all there.
        together(
            8,
            |_| db.service(),
            |nth, mut session| {
                session.exec(&format!(
                    "select nightowls.set_config_value('k{nth}', '{nth}', {})",
                    nth % 2 == 0
                ));
            },
        );
        for nth in 0..8 {
            assert_eq!(
                text(
                    &mut service,
                    &format!("select nightowls.get_config_value('k{nth}')")
                ),
                nth.to_string()
            );
        }
    });
}

#[test]
fn a_secret_is_the_services_alone_in_vault_or_without() {
    on_each_install(|db| {
        for vault in [false, true] {
            if vault {
                db.superuser().exec(VAULT);
                if db.install() == crate::support::Install::Plain {
                    db.superuser().exec("grant usage on schema vault to owl_owner; grant select on vault.decrypted_secrets to owl_owner; grant execute on all functions in schema vault to owl_owner");
                }
            } else {
                default_org(db);
                db.service().exec("select nightowls.add_member('member')");
            }
            let name = if vault { "in_vault" } else { "in_table" };
            let mut service = db.service();
            for value in ["Zanzibar-1", "Zanzibar-2"] {
                service.exec(&format!(
                    "select nightowls.set_config_value('{name}', '{value}', true)"
                ));
                assert_eq!(
                    text(
                        &mut service,
                        &format!("select nightowls.get_config_value('{name}')")
                    ),
                    value
                );
            }
            service.exec("select nightowls.set_config_value('open', 'seen')");
            let kept = lines(
                &mut db.superuser(),
                &format!("select config -> '{name}' from nightowls.app_config"),
            );
            assert_eq!(
                kept,
                [format!(
                    r#"{{"secret": "{}"}}"#,
                    if vault { "vault" } else { "table" }
                )]
            );
            let mut member = db.session(MEMBER);
            assert_eq!(
                as_user(
                    &mut member,
                    "member",
                    "select nightowls.get_config_value('open')"
                ),
                Ok(vec!["seen".to_owned()])
            );
            for (user, sql) in [
                ("member", format!("select nightowls.get_config_value('{name}')")),
                ("member", "select * from nightowls.app_config".to_owned()),
                ("member", "select * from nightowls._config_secrets".to_owned()),
                ("member", format!("select nightowls._get_config_value(nightowls.current_org(), '{name}', true)")),
                ("member", "select nightowls.set_config_value('open', 'changed')".to_owned()),
                ("nobody", "select nightowls.get_config_value('open')".to_owned()),
                ("nobody", "select nightowls._my_config_value((select o from unnest(array[gen_random_uuid()]) o), 'open')".to_owned()),
            ] {
                let refusal = as_user(&mut member, user, &sql).unwrap_err();
                assert_eq!(refusal.code, "42501", "{user}: {sql}");
                assert!(!format!("{refusal}").contains("Zanzibar"));
            }
            // What is no secret any more leaves nothing behind.
            service.exec(&format!(
                "select nightowls.set_config_value('{name}', 'plain')"
            ));
            assert_eq!(
                as_user(
                    &mut member,
                    "member",
                    &format!("select nightowls.get_config_value('{name}')")
                ),
                Ok(vec!["plain".to_owned()])
            );
            assert_eq!(
                text(
                    &mut db.superuser(),
                    "select count(*) from nightowls._config_secrets"
                ),
                "0"
            );
            if vault {
                assert_eq!(
                    text(
                        &mut db.superuser(),
                        "select string_agg(secret, ' ') from vault.secrets"
                    ),
                    "unset"
                );
            }
        }
    });
}
