package server

import (
	"testing"
	"time"

	"github.com/cairnstore/cairn/proto/wire"
)

// TestRepliesTellTheStoresTime: what the store took is told, not what the
// network did.
func TestRepliesTellTheStoresTime(t *testing.T) {
	st := newHeldStore()
	_, addr, _ := start(t, Config{Stores: []Store{st}})
	r := connect(t, addr)
	r.send(hello())
	r.reply()
	before := time.Now()
	r.send(&wire.Request{Kind: wire.Read, ID: 5, Store: st.id, Count: 1})
	st.wait(t, 1)
	came := time.Now()
	for time.Since(came) < 3*time.Millisecond { // the store is at work
	}
	st.mu.Lock()
	answer := st.held[0]
	st.mu.Unlock()
	answer()
	rep := r.reply()
	if took := time.Duration(rep.Took) * time.Microsecond; rep.ID != 5 || took < 2*time.Millisecond || took > time.Since(before) {
		t.Errorf("the store took %v of %v", took, time.Since(before))
	}
	r.send(&wire.Request{Kind: wire.Ping, ID: 6})
	if rep := r.reply(); rep.Took != 0 {
		t.Errorf("a ping, which no store has seen, took %d µs", rep.Took)
	}
}
