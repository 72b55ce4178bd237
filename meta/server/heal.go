package server

import (
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A node in doubt serves nothing and mends itself:
//
//	its state is wrong       the state is emptied; snapshot and log give it back
//	its log, vote, snapshot  everything is emptied; it comes back like a node
//	is damaged               without a memory (member.go): it votes again once it
//	                         has what any peer had when asked
//
// Which it is stands in the record before anything is removed, so that a crash
// half way changes nothing. A cluster's only node has nobody to mend it.
//
// State is doubted when other nodes have another: every few seconds the leader
// puts an audit into the log, each node notes its state's hash at that entry,
// and compares it with the others'.

// Errors that end a node whose next start, by the same process too, mends it.
var errHeals = errors.New("the next start mends it")

const (
	doubtState = "state"
	doubtAll   = "all"
)

// Heals reports whether a node that ended with err (Server.Err) should be
// started again at once.
func Heals(err error) bool { return errors.Is(err, errHeals) }

// inDoubt records what is wrong and ends the node.
func (s *Server) inDoubt(what string, why error) {
	s.mu.Lock()
	over := s.err != nil || s.closed
	s.mu.Unlock()
	if over {
		return
	}
	s.dir.mu.Lock()
	s.dir.rec.Doubt = what
	err := s.dir.save()
	s.dir.mu.Unlock()
	s.fail(errors.Join(fmt.Errorf("%w: %w", why, errHeals), err))
}

// heal empties what is in doubt, before it is opened.
func (s *Server) heal() error {
	d := s.dir
	if d.rec.Doubt == "" {
		return nil
	}
	names := []string{"state", "state.opening"}
	if d.rec.Doubt == doubtAll {
		if len(s.others()) == 0 {
			return status.Errorf(status.Corrupt, "the metadata in %s is damaged and this is the cluster's only node: restore a backup (`cairn meta restore`)", d.path)
		}
		names = append(names, "raft.db", "snapshots")
		d.rec.Joined, d.rec.NeedIndex, d.rec.Lost = false, 0, true
	}
	s.log.Warn("this metadata node was in doubt and begins anew", "emptied", names)
	for _, n := range names {
		if err := os.RemoveAll(d.file(n)); err != nil {
			return fmt.Errorf("emptying %s: %w", d.file(n), err)
		}
	}
	d.rec.Doubt = ""
	return d.save()
}

const auditEvery = 5 * time.Second

// audits proposes audits while this node leads.
func (s *Server) audits() {
	t := time.NewTicker(s.cfg.audit)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		if _, err := s.lead(); err != nil {
			continue
		}
		if a, _ := s.fsm.at(); a > s.fsm.auditIndex() { // something has happened since the last
			if err := s.proposeAudit(); err != nil {
				s.log.Warn("metadata audit", "err", err)
			}
		}
	}
}

// compare compares what every node has noted, and hears how full their disks
// are: also while nothing can be committed because those are full.
func (s *Server) compare() {
	t := time.NewTicker(s.cfg.audit)
	defer t.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case <-t.C:
		}
		replies := s.nodes(s.ctx)
		s.peerFree(replies)
		if why := s.outvoted(replies); why != nil {
			s.inDoubt(doubtState, why)
			return
		}
	}
}

// outvoted says whether a majority of all nodes has one state at an audit and
// this node another.
func (s *Server) outvoted(replies []*pb.NodeReply) error {
	index, hash := s.fsm.audit()
	if index == 0 {
		return nil
	}
	votes := map[uint64]int{}
	for _, r := range replies {
		if r.Id != s.id && r.AuditIndex == index {
			votes[r.AuditHash]++
		}
	}
	for h, n := range votes {
		if h != hash && n >= len(replies)/2+1 {
			return status.Errorf(status.Corrupt, "at command %d this metadata node has the state hash %016x and %d of %d nodes have %016x", index, hash, n, len(replies), h)
		}
	}
	return nil
}
