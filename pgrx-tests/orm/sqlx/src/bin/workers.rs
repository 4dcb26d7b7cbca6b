//! Four at once on one aggregate: every append must arrive, by way of the retry loop.

#[path = "../owls.rs"]
#[allow(dead_code)]
mod owls;

use owls::{begin, change, history};
use serde_json::{Value, json};
use sqlx::{PgPool, Row};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let pool = PgPool::connect(&std::env::var("DATABASE_URL")?).await?;
    let org = std::env::var("ORG_ID")?.parse()?;
    let aggregate = ("counter", "c");
    let workers: Vec<_> = (0..4)
        .map(|worker| {
            let pool = pool.clone();
            tokio::spawn(async move {
                for turn in 0..10 {
                    change(&pool, org, aggregate, |events| {
                        ("counted", json!({"worker": worker, "turn": turn, "before": events.len()}))
                    })
                    .await?;
                }
                Ok::<_, sqlx::Error>(())
            })
        })
        .collect();
    for worker in workers {
        worker.await??;
    }

    let events = history(&mut begin(&pool, org).await?, aggregate).await?;
    let in_order = events
        .iter()
        .enumerate()
        .all(|(number, event)| event.get::<Value, _>("payload")["before"] == number);
    println!("counted: {}, in order: {in_order}", events.len());
    Ok(())
}
