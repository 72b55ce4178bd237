package server

import (
	"fmt"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// A node without a memory must not vote. If its directory was lost, it has
// forgotten which entries it has confirmed and whom it has voted for; electing
// a node that lags, it would undo what was committed. So a node with a new
// directory first asks all its peers how far they are:
//
//   - nobody has an entry beyond the bootstrap: the cluster is new, and it
//     bootstraps like the others. Its first start needs every node, once.
//   - somebody has: this node's memory is lost, or it came late. It takes part,
//     but gives no vote and asks for none until it holds everything any peer
//     held when asked: any entry it may ever have confirmed is below that.
//
// Either way it never votes in a term some peer has seen already, in which it
// may have voted before. A peer that does not answer is waited for: with it and
// with the lost memory a majority may be gone, and only an operator may decide
// to go on without.
//
// An entry is "beyond the bootstrap" from index 2 on: a leader's first act is
// to store one.

const (
	askEvery   = 100 * time.Millisecond
	askTimeout = time.Second
)

// voter is the bar a node without a memory has to clear.
type voter struct {
	need    uint64 // applied index from which on it may vote
	above   uint64 // it votes only in higher terms
	header  raft.RPCHeader
	applied func() uint64

	refusals atomic.Int64 // of others' requests
}

// may says whether this node may take part in an election of that term, and
// the term to answer if not.
func (v *voter) may(term uint64) (uint64, bool) {
	if term <= v.above {
		return v.above, false
	}
	return term, v.applied() >= v.need
}

// others are the other nodes: as last heard, or of the file.
func (s *Server) others() (out []Peer) {
	all := s.dir.record().Members
	if len(all) == 0 {
		all = s.cfg.Peers
	}
	for _, p := range all {
		if p.ID != s.id && p.ID != s.cfg.ID {
			if q, ok := s.addrs[raft.ServerID(p.ID)]; ok {
				p = q
			}
			out = append(out, p)
		}
	}
	return out
}

// phaseNew and phaseStarting are what a node calls itself before raft runs:
// undecided, and decided.
const (
	phaseNew      = "new"
	phaseStarting = "starting"
)

func phaseOf(r record) string {
	if r.Joined {
		return phaseStarting
	}
	return phaseNew
}

func (s *Server) say(phase string) { s.phase.Store(&phase) }

// enter brings a node with a new directory into the cluster. It returns when
// the node runs or the server is closed.
//
// In a new cluster nobody starts raft before all have decided: else two could
// elect a leader, and the third would take its own new directory for a loss.
func (s *Server) enter() {
	err := s.decide()
	if err == nil && s.dir.record().NeedIndex == 0 {
		s.waitForPeers("that it has decided", func(r *pb.NodeReply) bool { return r.State != phaseNew })
	}
	if err == nil && s.ctx.Err() == nil {
		err = s.start()
	}
	if err != nil {
		s.fail(fmt.Errorf("joining the metadata cluster: %w", err))
	}
}

// waitForPeers asks until every peer's answer will do, or the server is closed.
func (s *Server) waitForPeers(what string, do func(r *pb.NodeReply) bool) (replies []*pb.NodeReply) {
	for told := time.Duration(0); s.ctx.Err() == nil; told += askEvery {
		missing := ""
		peers := s.others()
		replies = s.askAll(s.ctx, peers)
		for i, r := range replies {
			if r == nil || !do(r) {
				missing = peers[i].ID + " at " + peers[i].APIAddr
			}
		}
		if missing == "" {
			break
		}
		if told > 0 && told%(10*time.Second) == 0 {
			s.log.Warn("this metadata node's directory is new: before it takes part, every peer must say "+what, "missing", missing)
		}
		select {
		case <-s.ctx.Done():
		case <-time.After(askEvery):
		}
	}
	return replies
}

// decide finds out whether the cluster is new or this node's memory lost, and
// records it. Crash points: before the record the next start asks again; after
// it, it knows.
func (s *Server) decide() error {
	replies := s.waitForPeers("how far it is", func(*pb.NodeReply) bool { return true })
	if s.ctx.Err() != nil {
		return nil
	}
	s.dir.mu.Lock()
	defer s.dir.mu.Unlock()
	index, rec := uint64(0), &s.dir.rec
	for _, r := range replies {
		index, rec.AboveTerm = max(index, r.LastIndex), max(rec.AboveTerm, r.Term)
	}
	if index > 1 {
		rec.NeedIndex = index
		s.log.Warn("this metadata node's directory is new but the cluster is not: it votes once it has caught up", "index", index, "term", rec.AboveTerm)
	} else if rec.Lost {
		return status.Errorf(status.Corrupt, "the memory of this metadata node was damaged and emptied, and no other node has any: restore a backup (`cairn meta restore`)")
	} else if has, err := raft.HasExistingState(s.logs, s.vote, s.snaps); err != nil {
		return err
	} else if !has {
		if err := raft.BootstrapCluster(s.raftConfig(false), s.logs, s.vote, s.snaps, nil, s.configuration()); err != nil {
			return err
		}
	}
	rec.Joined = true
	if err := s.dir.save(); err != nil {
		return err
	}
	s.say(phaseStarting)
	return nil
}
