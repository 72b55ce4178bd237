package server

import (
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
)

// Watching: every node keeps the last changes it has applied, in a ring, and
// any node tells them to whoever asks, from the revision the asker names. The
// ring is the only buffer: a watcher that is slow finds its place overwritten,
// and is told to take everything for changed.

const (
	newsKept   = 16_384          // changes kept, and up to as many again before the oldest are dropped
	newsBatch  = 1024            // in one reply
	watchBeat  = 3 * time.Second // a reply without changes after this long
	watchStale = 6 * time.Second // a follower that has not heard of its leader for so long tells nobody anything
	maxWatches = 20_000          // at once, on one node
)

// news is the ring.
type news struct {
	mu   sync.Mutex // guards all below
	ring []told     // newest last; at most 2 * newsKept
	from uint64     // all changes above this revision are in the ring
	to   uint64     // up to this one
	wake chan struct{}
}

type told struct {
	revision uint64
	change   *pb.Change
}

// begin forgets everything: what happened up to a revision is not known.
func (n *news) begin(revision uint64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.ring, n.from, n.to = nil, revision, revision
	n.ringBell()
}

// add appends what a batch changed; revisions rise.
func (n *news) add(revision uint64, cs []*pb.Change) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, c := range cs {
		n.ring = append(n.ring, told{revision, c})
	}
	if over := len(n.ring) - newsKept; over > newsKept { // seldom: it copies what stays
		n.from = n.ring[over-1].revision // the rest of that batch is of no use
		for over < len(n.ring) && n.ring[over].revision == n.from {
			over++
		}
		n.ring = append([]told(nil), n.ring[over:]...)
	}
	n.to = revision
	n.ringBell()
}

func (n *news) ringBell() {
	if n.wake != nil {
		close(n.wake)
		n.wake = nil
	}
}

// since returns what changed after a revision, up to which one that is, whether
// anything is missing, and a channel that is closed at the next change.
func (n *news) since(after uint64) (rep *pb.WatchReply, wake <-chan struct{}) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.wake == nil {
		n.wake = make(chan struct{})
	}
	rep = &pb.WatchReply{Revision: max(after, n.to)}
	if after < n.from {
		rep.Resync = true
		return rep, n.wake
	}
	lo, hi := 0, len(n.ring) // the first above after
	for lo < hi {
		if mid := (lo + hi) / 2; n.ring[mid].revision <= after {
			lo = mid + 1
		} else {
			hi = mid
		}
	}
	for i := lo; i < len(n.ring); i++ {
		if len(rep.Changes) >= newsBatch && n.ring[i].revision != n.ring[i-1].revision {
			rep.Revision = n.ring[i-1].revision
			break
		}
		rep.Changes = append(rep.Changes, n.ring[i].change)
	}
	return rep, n.wake
}

// Watch implements pb.MetaServer.
func (s *Server) Watch(req *pb.WatchRequest, out pb.Meta_WatchServer) error {
	if s.watches.Add(1) > maxWatches {
		s.watches.Add(-1)
		return out.Send(&pb.WatchReply{Detail: "this node has too many watchers: ask another"})
	}
	defer s.watches.Add(-1)
	after, news := req.After, &s.fsm.news
	if after == 0 { // from now on: whoever begins knows nothing
		after, _ = s.fsm.at()
		if err := out.Send(&pb.WatchReply{Revision: after, Resync: true}); err != nil {
			return err
		}
	}
	beat := time.NewTicker(watchBeat)
	defer beat.Stop()
	for beats := 0; ; {
		rep, wake := news.since(after)
		if len(rep.Changes) > 0 || rep.Resync || beats > 0 {
			if why := s.stale(); why != "" {
				return out.Send(&pb.WatchReply{Revision: after, Detail: why})
			}
			if s.behind(after) {
				rep.Resync, rep.Revision = true, s.applied()
			}
			if err := out.Send(rep); err != nil {
				return err
			}
			after, beats = rep.Revision, 0
			if len(rep.Changes) >= newsBatch {
				continue
			}
		}
		select {
		case <-wake:
		case <-beat.C:
			beats++
		case <-out.Context().Done():
			return out.Context().Err()
		case <-s.ctx.Done():
			return status.Errorf(status.Shutdown, "this metadata node is closing")
		}
	}
}

// stale says why this node should tell nothing: nobody has told it anything.
func (s *Server) stale() string {
	r := s.raft.Load()
	switch {
	case r == nil:
		return "this metadata node is starting: ask another"
	case r.State() == raft.Leader:
		return ""
	case time.Since(r.LastContact()) > watchStale:
		return "this metadata node has not heard of a leader for a while: ask another"
	}
	return ""
}

// behind: a leader that has not come as far as somebody has seen is of a
// restored cluster.
func (s *Server) behind(after uint64) bool {
	r := s.raft.Load()
	return r != nil && r.State() == raft.Leader && r.LastIndex() < after
}
