package machine

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"github.com/cairnstore/cairn/proto/status"
)

const (
	graceDefault   = 30 * time.Second // for a guest to power off, when ctx has no deadline
	buttonEvery    = 2 * time.Second  // a guest still booting misses the power button
	quitTimeout    = 3 * time.Second  // for QEMU to leave by itself
	killTimeout    = 10 * time.Second // for the kernel to end a killed QEMU
	hangTimeout    = 3 * time.Second  // after which a command is taken to wait for a dead server
	retryEvery     = 200 * time.Millisecond
	healBackoff    = 250 * time.Millisecond // doubles up to healBackoffMax
	healBackoffMax = 4 * time.Second
	healQuiet      = 10 * time.Second // after so long without an error, backoff starts anew
	probeTimeout   = time.Second      // to see whether a disk's server is there
)

// Stop ends the machine and returns when it is gone. Without force the guest
// is asked to power off first, until ctx's deadline (30 s if it has none); a
// guest that does not is cut off. When ctx is cancelled before, the machine is
// left running. With force the guest is not asked.
func (m *Machine) Stop(ctx context.Context, force bool) error {
	if !force {
		off, err := m.powerDown(ctx)
		if off || err != nil {
			return err
		}
	}
	return m.terminate()
}

// powerDown presses the power button until the guest has powered off (true) or
// its time is over (false).
func (m *Machine) powerDown(ctx context.Context) (bool, error) {
	grace, cancel := context.WithTimeout(ctx, graceDefault)
	if _, has := ctx.Deadline(); has {
		cancel()
		grace, cancel = context.WithCancel(ctx)
	}
	defer cancel()
	if m.paused() {
		// A paused guest cannot power off.
		if err := m.Resume(grace); err != nil && grace.Err() == nil && m.Exit() == "" {
			return false, err
		}
	}
	for {
		press, done := context.WithTimeout(grace, buttonEvery)
		err := m.do(press, "system_powerdown", nil, nil)
		done()
		if err != nil && errors.Is(err, status.Shutdown) {
			return false, err
		}
		select {
		case <-m.done:
			return true, nil
		case <-time.After(buttonEvery):
		case <-grace.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return false, status.Errorf(status.Shutdown, "VM %s: stopping was cancelled; it may still power off", m.spec.Name)
			}
			return false, nil
		}
	}
}

// terminate ends QEMU, by itself or by force.
func (m *Machine) terminate() error {
	m.mu.Lock()
	released := m.released
	m.stopping = !released
	m.mu.Unlock()
	if released && m.Exit() == "" {
		return status.Errorf(status.Shutdown, "VM %s is not watched by this process any more", m.spec.Name)
	}
	ctx, cancel := context.WithTimeout(context.Background(), quitTimeout)
	defer cancel()
	// Its answer may get lost as QEMU leaves; whether QEMU is gone is what counts.
	qerr := m.do(ctx, "quit", nil, nil)
	select {
	case <-m.done:
		return nil
	case <-ctx.Done():
	}
	if err := m.proc.kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return status.Errorf(status.Internal, "VM %s: QEMU (pid %d) does not quit (%v) and cannot be killed: %w", m.spec.Name, m.proc.pid, qerr, err)
	}
	select {
	case <-m.done:
		return nil
	case <-time.After(killTimeout):
		return status.Errorf(status.Timeout, "VM %s: QEMU (pid %d) was killed but does not end; it hangs in the kernel", m.spec.Name, m.proc.pid)
	}
}

func (m *Machine) paused() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.rec.Paused
}

// setPaused remembers, also for a host process to come, that the guest is to
// stand still.
func (m *Machine) setPaused(p bool) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.rec.Paused = p
	return m.rec.save(m.files)
}

// Pause stops the guest's CPUs. QEMU then waits for the requests under way,
// which takes as long as their server does; the guest stands still meanwhile,
// and that is all Pause promises.
//
// That wait could be broken off (yank), but it is not: a request cut off so is
// sent again on a new connection, and a server that was only slow may still
// carry out the first copy, over something newer.
func (m *Machine) Pause(ctx context.Context) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	if err := m.settled(); err != nil {
		return err
	}
	if err := m.setPaused(true); err != nil {
		return err
	}
	quick, cancel := context.WithTimeout(ctx, hangTimeout)
	err := m.do(quick, "stop", nil, nil)
	cancel()
	if err == nil {
		return m.refresh(ctx)
	}
	if !errors.Is(err, status.Unknown) || ctx.Err() != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state == "running" {
		return status.Errorf(status.Timeout, "VM %s does not stop: %w", m.spec.Name, err)
	}
	return nil
}

// Resume lets a paused guest go on. QEMU refuses while a request of before is
// still failing, so it is asked until ctx ends.
func (m *Machine) Resume(ctx context.Context) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	if err := m.settled(); err != nil {
		return err
	}
	if err := m.setPaused(false); err != nil {
		return err
	}
	return m.goOn(ctx)
}

// goOn asks QEMU to run the guest until it does. Called with ops held.
func (m *Machine) goOn(ctx context.Context) error {
	for {
		err := m.resume(ctx, false)
		if err == nil || errors.Is(err, status.Shutdown) {
			return err
		}
		select {
		case <-time.After(retryEvery):
		case <-m.done:
			return status.Errorf(status.Unavailable, "VM %s has ended: %s", m.spec.Name, m.Exit())
		case <-ctx.Done():
			return status.Errorf(status.Unavailable, "VM %s cannot go on: %w", m.spec.Name, err)
		}
	}
}

// resume is one attempt; replace gives every disk a new connection first.
// Called with ops held.
func (m *Machine) resume(ctx context.Context, replace bool) error {
	for i := range m.spec.Disks {
		if !replace {
			break
		}
		if err := m.replaceNode(ctx, i, 0); err != nil {
			return err
		}
	}
	if err := m.do(ctx, "cont", nil, nil); err != nil {
		return err
	}
	return m.refresh(ctx)
}

// healer lets a guest go on that was stopped by a disk's error, as soon as all
// its disks' servers are there again. It ends with m.ctx.
func (m *Machine) healer() {
	defer m.wg.Done()
	attempt, last := 0, time.Time{}
	for {
		select {
		case <-m.heal:
		case <-m.ctx.Done():
			return
		}
		if time.Since(last) > healQuiet {
			attempt = 0
		}
		for m.needsHeal() {
			select {
			case <-time.After(min(healBackoff<<min(attempt, 10), healBackoffMax)):
			case <-m.ctx.Done():
				return
			}
			if err := m.healOnce(attempt); err != nil {
				m.note(err.Error())
			}
			attempt++
			last = time.Now()
		}
	}
}

func (m *Machine) needsHeal() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.state == "io-error" && !m.rec.Paused && !m.rec.Incoming && !m.moving && !m.stopping && m.ctx.Err() == nil
}

// healOnce is one attempt. The first one trusts QEMU's own reconnecting; an
// NBD node that has given up for good needs to be replaced, which the later
// ones do.
func (m *Machine) healOnce(attempt int) error {
	m.ops.Lock()
	defer m.ops.Unlock()
	if !m.needsHeal() {
		return nil
	}
	for _, d := range m.spec.Disks {
		if err := reachable(m.ctx, d); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(m.ctx, replaceTimeout)
	defer cancel()
	return m.resume(ctx, attempt > 0)
}

// reachable reports whether somebody listens for a disk.
func reachable(ctx context.Context, d Disk) error {
	s, err := parseURI(d.URI)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, s.network(), s.address())
	if err != nil {
		return status.Errorf(status.Unavailable, "the disk's server is not there: %w", err)
	}
	return conn.Close()
}
