# What story S3 needs in Google Cloud: the job, a bucket, and three identities of which each can do
# its own part and no more. The API enqueues rows in Postgres and reads results; it has no right to
# run anything. Only the dispatcher's workers start executions.

terraform {
  required_version = ">= 1.5"
  required_providers {
    google = {
      source  = "hashicorp/google"
      version = ">= 5.30, < 8"
    }
  }
}

provider "google" {
  project = var.project
  region  = var.region
}

resource "google_project_service" "needed" {
  for_each           = toset(["iam.googleapis.com", "run.googleapis.com", "storage.googleapis.com"])
  service            = each.value
  disable_on_destroy = false
}

# --- identities ---

resource "google_service_account" "api" {
  account_id   = "compute-api"
  display_name = "The API: enqueues, and reads results"
}

resource "google_service_account" "worker" {
  account_id   = "compute-worker"
  display_name = "The dispatcher's workers: start, follow and cancel executions"
}

resource "google_service_account" "task" {
  account_id   = "compute-task"
  display_name = "What runs in the container: reads its input, writes its result"
}

# --- the computation ---

resource "google_cloud_run_v2_job" "count_primes" {
  name                = "count-primes"
  location            = var.region
  deletion_protection = false
  depends_on          = [google_project_service.needed]

  template {
    # As many tasks at once as a launch asks for: Cloud Run refuses fewer tasks than the parallelism,
    # and how many may run is bounded by `limits` of the dispatcher's job.
    parallelism = 0
    task_count  = 1

    template {
      service_account = google_service_account.task.email
      # Retries are the dispatcher's, so that they are counted and seen.
      max_retries = 0
      # The longest that a launch may ask for: `overrides.timeout` of the job.
      timeout = "7200s"

      containers {
        image = var.image
        resources {
          limits = {
            cpu    = "1"
            memory = "512Mi"
          }
        }
      }
    }
  }
}

# --- input documents and results ---

resource "google_storage_bucket" "dispatcher" {
  name                        = "${var.project}-dispatcher"
  location                    = var.region
  uniform_bucket_level_access = true
  public_access_prevention    = "enforced"

  soft_delete_policy {
    retention_duration_seconds = 0
  }

  lifecycle_rule {
    condition {
      age = var.keep_days
    }
    action {
      type = "Delete"
    }
  }
}

# --- who may do what ---

resource "google_project_iam_custom_role" "launcher" {
  role_id     = "dispatcherLauncher"
  title       = "Dispatcher: launch"
  description = "Start and cancel executions of a Cloud Run job."
  permissions = [
    "run.executions.cancel",
    "run.jobs.get",
    "run.jobs.run",
    "run.jobs.runWithOverrides",
  ]
}

# To follow, on the project: executions that nobody owns are looked for in one list over all jobs of
# the region, and log entries are the project's. It only reads.
resource "google_project_iam_custom_role" "follower" {
  role_id     = "dispatcherFollower"
  title       = "Dispatcher: follow"
  description = "Read executions and tasks of Cloud Run jobs, and the last lines that they wrote."
  permissions = [
    "logging.logEntries.list",
    "run.executions.get",
    "run.executions.list",
    "run.jobs.list",
    "run.tasks.list",
  ]
}

resource "google_project_iam_member" "worker_follows" {
  project = var.project
  role    = google_project_iam_custom_role.follower.id
  member  = google_service_account.worker.member
}

# On this one job. runWithOverrides is the power to run any command as the task's identity: nobody
# but the workers has it.
resource "google_cloud_run_v2_job_iam_member" "worker_launches" {
  name     = google_cloud_run_v2_job.count_primes.name
  location = var.region
  role     = google_project_iam_custom_role.launcher.id
  member   = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "worker_stores" {
  bucket = google_storage_bucket.dispatcher.name
  role   = "roles/storage.objectUser"
  member = google_service_account.worker.member
}

resource "google_storage_bucket_iam_member" "task_reads_input" {
  bucket = google_storage_bucket.dispatcher.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.task.member

  condition {
    title      = "inputs only"
    expression = "resource.name.startsWith('projects/_/buckets/${google_storage_bucket.dispatcher.name}/objects/inputs/')"
  }
}

# Results, also those in progress, which are written again and again; and claims, which are read back.
resource "google_storage_bucket_iam_member" "task_writes" {
  for_each = toset(["claims", "results"])
  bucket   = google_storage_bucket.dispatcher.name
  role     = "roles/storage.objectUser"
  member   = google_service_account.task.member

  condition {
    title      = "${each.value} only"
    expression = "resource.name.startsWith('projects/_/buckets/${google_storage_bucket.dispatcher.name}/objects/${each.value}/')"
  }
}

resource "google_storage_bucket_iam_member" "api_reads_results" {
  bucket = google_storage_bucket.dispatcher.name
  role   = "roles/storage.objectViewer"
  member = google_service_account.api.member

  condition {
    title      = "results only"
    expression = "resource.name.startsWith('projects/_/buckets/${google_storage_bucket.dispatcher.name}/objects/results/')"
  }
}
