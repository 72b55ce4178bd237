package server

import (
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// reach holds log entries back from a peer that does not answer until a
// heartbeat gets through to it again.
//
// raft tries such a peer at growing intervals, up to 10 s, and does not look at
// its own heartbeats (at most half a timeout apart): after an outage a follower
// would be without new entries for that long, and if another node fails then,
// nothing can be committed although a majority is up. Held back here, the
// sender has failed once, and goes on at once.
type reach struct {
	mu     sync.Mutex // guards the fields below
	down   map[raft.ServerID]chan struct{}
	heard  map[raft.ServerID]time.Time // when something got through last
	before raft.ServerID               // whom this node has followed last
}

// failed: entries did not get through.
func (r *reach) failed(id raft.ServerID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.down[id] == nil {
		if r.down == nil {
			r.down = map[raft.ServerID]chan struct{}{}
		}
		r.down[id] = make(chan struct{})
	}
}

// answered: something got through.
func (r *reach) answered(id raft.ServerID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.heard == nil {
		r.heard = map[raft.ServerID]time.Time{}
	}
	r.heard[id] = time.Now()
	if c := r.down[id]; c != nil {
		close(c)
		delete(r.down, id)
	}
}

// last is when a peer was heard of last by a node that leads since led, and whose
// leader before was heard of last at contact; zero: it cannot tell.
func (r *reach) last(id raft.ServerID, led, contact time.Time) time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	switch at := r.heard[id]; {
	case !at.Before(led):
		return at
	case id == r.before:
		return contact
	}
	return time.Time{}
}

// follows notes who leads; "" is nobody.
func (r *reach) follows(leader, self raft.ServerID) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if leader != "" && leader != self {
		r.before = leader
	}
}

// wait returns when the peer may be tried, or when there is no reason to any
// more: this node has stopped leading.
func (r *reach) wait(id raft.ServerID, leading func() bool) {
	r.mu.Lock()
	c := r.down[id]
	r.mu.Unlock()
	if c == nil {
		return
	}
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	for leading() {
		select {
		case <-c:
			return
		case <-t.C:
		}
	}
}

// AppendEntries implements raft.Transport.
func (t *transport) AppendEntries(id raft.ServerID, target raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	heartbeat := req.PrevLogEntry == 0 && req.PrevLogTerm == 0 && len(req.Entries) == 0 && req.LeaderCommitIndex == 0
	if !heartbeat {
		t.reach.wait(id, func() bool { return t.leads(req.Term) })
	}
	err := t.NetworkTransport.AppendEntries(id, target, req, resp)
	switch {
	case err == nil:
		t.reach.answered(id)
	case !heartbeat:
		t.reach.failed(id)
	}
	return err
}

// InstallSnapshot implements raft.Transport.
func (t *transport) InstallSnapshot(id raft.ServerID, target raft.ServerAddress, req *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	t.reach.wait(id, func() bool { return t.leads(req.Term) })
	err := t.NetworkTransport.InstallSnapshot(id, target, req, resp, data)
	if err != nil {
		t.reach.failed(id)
	}
	return err
}
