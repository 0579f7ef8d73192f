#!/bin/sh
# Tried here: shellcheck, and with a stand-in for gcloud. Not tried: Cloud Scheduler, as that needs an account.
# Lets Cloud Scheduler drain once a minute: RECEIVER_URL=https://… RECEIVER_CRON_SECRET=… REGION=… sh schedule.sh
set -eu
: "${RECEIVER_URL:?the address of the service}" "${RECEIVER_CRON_SECRET:?the key for draining}" "${REGION:?of the schedule}"

schedule() { # $1: create and its option for headers, or update and its own
  gcloud scheduler jobs "$1" http receiver-drain --location "$REGION" --schedule '* * * * *' \
    --uri "$RECEIVER_URL/v1/drain?seconds=50" --http-method POST \
    "$2" "Authorization=Bearer $RECEIVER_CRON_SECRET" --attempt-deadline 60s --max-retry-attempts 0
}
if gcloud scheduler jobs describe receiver-drain --location "$REGION" > /dev/null 2>&1; then
  schedule update --update-headers
else
  schedule create --headers
fi
