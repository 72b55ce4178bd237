// Package samples holds the files a cluster on real machines begins with:
// configurations, systemd units, alert rules and a dashboard.
//
// Duty: give them to `cairn config sample`. Floor: F0. It checks nothing:
// cmd/cairn's tests do.
package samples

import "embed"

// Files are the samples, by name.
//
//go:embed *.toml *.service *.socket *.yml *.json
var Files embed.FS
