package server

import (
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/cairnstore/cairn/meta/state"
	"github.com/cairnstore/cairn/proto/pb"
)

const (
	houseEvery = time.Second // between two looks at what is due
	houseSteps = 64          // bounded steps in a row; then others have their turn
)

// keepHouse does what is due, while this node leads: state has no clock of its
// own. A look costs one read of one key.
func (s *Server) keepHouse() {
	t := time.NewTicker(houseEvery)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		for range houseSteps {
			if !s.due() {
				break
			}
			if err := s.houseStep(); err != nil {
				s.log.Warn("metadata housekeeping", "err", err)
				break
			}
		}
		if err := s.raiseFormat(); err != nil {
			s.log.Warn("raising the state version", "err", err)
		}
	}
}

func (s *Server) due() (is bool) {
	if _, err := s.lead(); err != nil {
		return false
	}
	err := s.fsm.read(func(kv state.KV) {
		at := state.NextDue(kv)
		is = at > 0 && at <= s.cfg.clock().UnixNano()
	})
	return err == nil && is
}

func (s *Server) houseStep() error    { return s.propose(&pb.Housekeeping{}) }
func (s *Server) proposeAudit() error { return s.propose(&pb.Housekeeping{Audit: true}) }

// leaderName is who did, in the event log, what the leader does by itself.
const leaderName = "the metadata leader"

// propose puts the leader's own command into the log.
func (s *Server) propose(op *pb.Housekeeping) error {
	cmd := &pb.Command{Who: leaderName, TimeUnixNs: s.cfg.clock().UnixNano(), Op: &pb.Command_Housekeeping{Housekeeping: op}}
	if err := s.checkFree(cmd); err != nil {
		return err
	}
	b, err := proto.Marshal(cmd)
	if err != nil {
		return err
	}
	_, err = s.commit(b)
	return err
}
