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
	mu    sync.Mutex // guards down and heard
	down  map[raft.ServerID]chan struct{}
	heard map[raft.ServerID]time.Time // when something got through last
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

// since is when something got through to a peer last, as Unix nanoseconds; 0: it
// did not since this node began.
func (r *reach) since(id raft.ServerID) int64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	if at := r.heard[id]; !at.IsZero() {
		return at.UnixNano()
	}
	return 0
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
