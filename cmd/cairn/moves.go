package main

import (
	"fmt"
	"sync"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
)

// moves is what this host's process remembers of live migrations: of those that
// leave, where to; of those that came, how they went. Nothing depends on it but
// what people are shown: a process that begins anew asks metadata.
type moves struct {
	mu   sync.Mutex
	out  map[string]move            // by VM, under way from here
	came map[string]*pb.VMMigration // by VM, until its machine ends; ≤ the machines of this host
	at   map[string]time.Time       // when a landing was begun
}

type move struct {
	disks   []string
	session string // of the gateway they go to
	host    string
	begun   time.Time
}

func newMoves() *moves {
	return &moves{out: map[string]move{}, came: map[string]*pb.VMMigration{}, at: map[string]time.Time{}}
}

func (m *moves) begin(vm string, disks []string, session, host string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.out[vm] = move{disks, session, host, time.Now()}
}

func (m *moves) get(vm string) (move, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	mv, ok := m.out[vm]
	return mv, ok
}

func (m *moves) end(vm string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.out, vm)
}

// landing keeps what the host a VM comes from has measured.
func (m *moves) landing(vm string, soFar *pb.VMMigration) {
	if soFar.GetTotalUs() == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.came[vm], m.at[vm] = soFar, time.Now()
}

// landed adds the rest and says it in words; "" if nothing was measured.
func (m *moves) landed(vm string) string {
	m.mu.Lock()
	defer m.mu.Unlock()
	g, at := m.came[vm], m.at[vm]
	if g == nil || g.State == "landed" {
		return ""
	}
	more := us(time.Since(at))
	g.State, g.TotalUs, g.StillUs = "landed", g.TotalUs+more, g.StillUs+more
	return fmt.Sprintf(" in %.1f s, with %s of memory sent; it stood still for %d ms", float64(g.TotalUs)/1e6, formatSize(g.SentBytes), g.StillUs/1000)
}

func (m *moves) last(vm string) *pb.VMMigration {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.came[vm]
}

// ended forgets a machine.
func (m *moves) ended(vm string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.came, vm)
	delete(m.at, vm)
}
