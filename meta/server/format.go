package server

import (
	"errors"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Programs of two versions in one cluster, while it is upgraded node by node:
// state.Format has what a version is. Nothing newer than the version in use is
// taken; the leader raises that when every member, learners too, says that it knows
// a newer one. A node that was silent holds it back until it answers or is removed.
// From then on a program that knows only the older one is refused its own
// directory, a place in the cluster, and the log.

func tooNew(used, knows uint32) error {
	return status.Errorf(status.Unsupported, "the metadata cluster uses state version %d and this program knows %d: start the newer program (a downgrade is possible until the version in use rises)", used, knows)
}

func (s *Server) formatInUse() (used uint32, err error) {
	err = s.fsm.read(func(kv state.KV) { used = state.FormatOf(kv) })
	return used, err
}

// checkFormat refuses a command that some member might not understand. The version
// is raised once a second; a new cluster's first command does not wait for that.
func (s *Server) checkFormat(cmd *pb.Command) error {
	if state.NeedsFormat(cmd) <= 1 {
		return nil // the most of them: no look at the state
	}
	var refused error
	check := func() error {
		return s.fsm.read(func(kv state.KV) { refused = state.CheckFormat(kv, cmd) })
	}
	if err := check(); err != nil || refused == nil {
		return err
	}
	if err := errors.Join(s.raiseFormat(), check()); err != nil {
		return err
	}
	return refused
}

// raiseFormat puts the newest version in use that every member knows.
func (s *Server) raiseFormat() error {
	if _, err := s.lead(); err != nil {
		return nil // the leader does it
	}
	used, err := s.formatInUse()
	if err != nil || used >= s.cfg.format {
		return err
	}
	all := s.cfg.format
	for _, n := range s.nodes(s.ctx) {
		all = min(all, n.Format) // 0: it did not answer
	}
	if all <= used {
		return nil
	}
	return s.propose(&pb.Housekeeping{Audit: true, Format: all})
}
