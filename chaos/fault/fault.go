// Package fault breaks a running cluster on purpose, by rules and a seed.
//
// Duty: the rules as text (Script), the seeded schedule that follows from them
// (Scheduler: pure, no clock), the loop that acts on a cluster and records
// what it did as a script that replays it (Run), and the carrier that reaches
// processes through their pid files (Processes). Floor: F5. It starts no
// cluster and judges nothing (chaos/cluster and chaos/check do).
package fault

import (
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// Cluster is what faults act on. Its methods may be called concurrently. An
// error of kind NotFound means the process is not running at the moment: a
// fault that came while another was still felt.
type Cluster interface {
	Names(kind string) []string               // all processes of the kind KindHost or KindMeta, running or not
	MetaLeader() (string, error)              // name of the metadata leader; Unavailable when there is none now
	Kill(name string) error                   // -9; returns when the process is gone
	Pause(name string, d time.Duration) error // stops it, and returns when it goes on, d later
	Hold(name string) error                   // from now on nobody restarts it when it dies
	Release(name string) error                // it is restarted again; fine when it is not held
}

// The kinds of process.
const (
	KindHost = "host"
	KindMeta = "meta"
)

var kinds = []string{KindHost, KindMeta}

// leader is the target that is known only when the fault is due.
const leader = "meta leader"

// Verb is what is done to a process.
type Verb string

// The verbs of a script.
const (
	Kill  Verb = "kill"  // kill -9; its supervisor restarts it
	Pause Verb = "pause" // SIGSTOP, and SIGCONT after a while
	Hold  Verb = "hold"  // kill -9 and keep it down for a while
)

// release ends a Hold. A script cannot ask for it: it follows from the hold.
const release Verb = "release"

// Action is one thing to do at one time.
type Action struct {
	At     time.Duration // since the run began
	Do     Verb
	Target string        // a process's name, or "meta leader"
	For    time.Duration // of a pause or hold; 0 otherwise

	id int // a release has that of its hold
}

// String is the action as a line of a script.
func (a Action) String() string {
	s := "at " + a.At.String() + " " + string(a.Do) + " " + a.Target
	if a.For > 0 {
		s += " " + a.For.String()
	}
	return s
}

func invalid(format string, args ...any) error {
	return status.Errorf(status.Invalid, format, args...)
}
