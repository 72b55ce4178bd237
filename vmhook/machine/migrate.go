package machine

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

// A machine moves to another host with its memory in these steps, of A, where it
// runs, and B, a machine of the same spec that was started with Spec.Incoming:
//
//	B Receive   waits for the memory on a unix socket
//	A Send      sends it while the guest runs, then stops it: all but the last is there
//	            (the owner moves the disks)
//	A Finish    sends the rest; from then on A's memory is no longer needed
//	B Arrived   it is all there
//	            (the owner decides that B runs, and never A again)
//	B Land      runs
//
// Until the owner has decided, GoBack lets A run again, whatever state QEMU is in;
// B must have been ended before. A QEMU whose migration fails lets its guest go on
// by itself: that is why A's failure decides for A, and B waits to be told.
//
// The owner carries the bytes between the two sockets.

const (
	// startedMax bounds the start of a migration in QEMU, finishMax the last part:
	// the devices' state.
	startedMax = 10 * time.Second
	finishMax  = 30 * time.Second
	askEvery   = 20 * time.Millisecond // beside QEMU's events, which can get lost
	// stillMaxMs is how long the guest may stand still for the last pages, by
	// QEMU's estimate; more is sent while it runs.
	stillMaxMs = 100
)

// capabilities of both ends.
var capabilities = []object{
	{"capability": "events", "state": true},
	{"capability": "pause-before-switchover", "state": true},
	{"capability": "late-block-activate", "state": true},
}

// Migration is how far the sending or receiving of a machine's memory is.
type Migration struct {
	State     string // QEMU's: none, setup, active, pre-switchover, device, completed, failed, cancelled
	Sent      uint64 // bytes
	Total     uint64 // bytes of memory
	Remaining uint64 // bytes
	Why       string // of a failure
}

// over reports whether nothing more will happen by itself.
func (g Migration) over() bool {
	switch g.State {
	case "none", "completed", "failed", "cancelled":
		return true
	}
	return false
}

// settled refuses what does not go with a migration.
func (m *Machine) settled() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.moving || m.rec.Incoming {
		return status.Errorf(status.Conflict, "VM %s is moving between hosts: ask again when it has arrived", m.spec.Name)
	}
	return nil
}

// Arriving reports whether it waits to be told to run here, after a migration.
func (m *Machine) Arriving() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec.Incoming
}

// Stopped is when the guest's processors were last seen to stop.
func (m *Machine) Stopped() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.stopped
}

// Migration asks QEMU how far it is.
func (m *Machine) Migration(ctx context.Context) (Migration, error) {
	var q struct {
		Status string `json:"status"`
		Why    string `json:"error-desc"`
		RAM    struct {
			Transferred uint64 `json:"transferred"`
			Total       uint64 `json:"total"`
			Remaining   uint64 `json:"remaining"`
		} `json:"ram"`
	}
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	if err := m.do(ctx, "query-migrate", nil, &q); err != nil {
		return Migration{}, err
	}
	if q.Status == "" {
		q.Status = "none"
	}
	return Migration{State: q.Status, Sent: q.RAM.Transferred, Total: q.RAM.Total, Remaining: q.RAM.Remaining, Why: q.Why}, nil
}

// await waits until the migration is as wanted, or over.
func (m *Machine) await(ctx context.Context, want func(Migration) bool) (Migration, error) {
	t := time.NewTicker(askEvery)
	defer t.Stop()
	for {
		m.mu.Lock()
		changed := m.changed
		m.mu.Unlock()
		g, err := m.Migration(ctx)
		if err != nil || want(g) || g.over() {
			return g, err
		}
		select {
		case <-changed:
		case <-t.C:
		case <-ctx.Done():
			return g, status.Errorf(status.Timeout, "VM %s is still in the state %q of its migration: %w", m.spec.Name, g.State, ctx.Err())
		}
	}
}

// Receive makes a machine that was started with Spec.Incoming wait for memory, and
// returns the unix socket it comes in by.
func (m *Machine) Receive(ctx context.Context) (socket string, err error) {
	if err := m.do(ctx, "migrate-set-capabilities", object{"capabilities": capabilities}, nil); err != nil {
		return "", err
	}
	return m.files.memory, m.do(ctx, "migrate-incoming", object{"uri": "unix:" + m.files.memory}, nil)
}

// Send sends the guest's memory to a unix socket and returns when all but the last
// is there: the guest stands still, and its disks are flushed. After an error
// GoBack has to be called. What is left of an attempt by an earlier process is
// ended first.
func (m *Machine) Send(ctx context.Context, socket string) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	if g, err := m.Migration(ctx); err != nil || !g.over() {
		if err = errors.Join(err, m.goBack(ctx)); err != nil {
			return err
		}
	}
	if err := m.sendable(ctx); err != nil {
		return err
	}
	for _, c := range []struct {
		name string
		args object
	}{
		{"migrate-set-capabilities", object{"capabilities": capabilities}},
		{"migrate-set-parameters", object{"downtime-limit": stillMaxMs, "max-bandwidth": 0}},
		{"migrate", object{"uri": "unix:" + socket}},
	} {
		begin, cancel := context.WithTimeout(ctx, startedMax)
		err := m.do(begin, c.name, c.args, nil)
		cancel()
		if err != nil {
			return err
		}
	}
	g, err := m.await(ctx, func(g Migration) bool { return g.State == "pre-switchover" })
	if err == nil && g.State != "pre-switchover" {
		err = m.failed(g)
	}
	return err
}

// sendable claims the machine for a migration.
func (m *Machine) sendable(ctx context.Context) error {
	if err := m.refresh(ctx); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.moving || m.rec.Incoming:
		return status.Errorf(status.Conflict, "VM %s is moving already", m.spec.Name)
	case m.state != "running":
		return status.Errorf(status.Conflict, "VM %s is %s: only a running one can move live", m.spec.Name, m.state)
	}
	m.moving = true
	return nil
}

func (m *Machine) setMoving(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.moving = on
}

func (m *Machine) failed(g Migration) error {
	why := g.Why
	if why == "" {
		why = "the other side is gone"
	}
	return status.Errorf(status.Unavailable, "QEMU could not send the memory of VM %s: %s (%s)", m.spec.Name, why, g.State)
}

// Finish sends what is left after Send. On success this guest will never run again
// unless GoBack lets it. It may be asked again, also by a later process.
func (m *Machine) Finish(ctx context.Context) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	m.setMoving(true)
	ctx, cancel := context.WithTimeout(ctx, finishMax)
	defer cancel()
	g, err := m.Migration(ctx)
	if err == nil && g.State == "pre-switchover" {
		err = m.do(ctx, "migrate-continue", object{"state": "pre-switchover"}, nil)
	}
	if err == nil {
		g, err = m.await(ctx, func(Migration) bool { return false })
	}
	if err == nil && g.State != "completed" {
		err = m.failed(g)
	}
	return err
}

// GoBack gives a migration up and lets the guest run here, on the disks it had.
func (m *Machine) GoBack(ctx context.Context) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	return m.goBack(ctx)
}

func (m *Machine) goBack(ctx context.Context) error {
	g, err := m.Migration(ctx)
	if err == nil && !g.over() {
		// One that ends by itself in this moment refuses to be cancelled.
		if cerr := m.do(ctx, "migrate_cancel", nil, nil); cerr != nil && !errors.Is(cerr, status.Invalid) {
			return cerr
		}
		_, err = m.await(ctx, func(Migration) bool { return false })
	}
	if err != nil {
		return err
	}
	m.setMoving(false)
	if m.paused() {
		return nil
	}
	return m.goOn(ctx)
}

// Arrived waits until all memory has come.
func (m *Machine) Arrived(ctx context.Context) error {
	g, err := m.await(ctx, func(Migration) bool { return false })
	if err == nil && g.State != "completed" {
		err = status.Errorf(status.NotFound, "the memory of VM %s has not come whole: %s", m.spec.Name, g.State)
	}
	return err
}

// Land runs a machine that has arrived. It may be asked again, also by a later
// process.
func (m *Machine) Land(ctx context.Context) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	if !m.Arriving() {
		return nil
	}
	if err := m.Arrived(ctx); err != nil {
		return err
	}
	if err := m.goOn(ctx); err != nil {
		return err
	}
	if err := os.Remove(m.files.memory); err != nil && !errors.Is(err, os.ErrNotExist) {
		return status.Errorf(status.IO, "VM %s: %w", m.spec.Name, err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rec.Incoming, m.rec.Paused = false, false
	return m.rec.save(m.files)
}
