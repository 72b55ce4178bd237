package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/qmp"
)

const (
	redialAfter  = 100 * time.Millisecond // between attempts to reach the monitor
	greetTimeout = 3 * time.Second        // for one attempt
	queryTimeout = 3 * time.Second        // for a question QEMU answers at once
)

// monitor keeps one connection to QEMU's monitor and turns its events into
// state. It ends with m.ctx.
func (m *Machine) monitor() {
	defer m.wg.Done()
	for m.ctx.Err() == nil {
		c, err := m.dialMonitor(m.ctx)
		if err == nil {
			err = m.follow(c)
		}
		if err != nil && m.ctx.Err() == nil {
			m.note(err.Error())
		}
		select {
		case <-time.After(redialAfter):
		case <-m.ctx.Done():
		}
	}
}

func (m *Machine) dialMonitor(ctx context.Context) (*qmp.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, greetTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", m.files.monitor)
	if err != nil {
		return nil, status.Errorf(status.Unavailable, "QEMU's monitor: %w", err)
	}
	return qmp.New(ctx, conn)
}

// follow serves one connection until it ends.
func (m *Machine) follow(c *qmp.Client) error {
	m.setClient(c)
	err := c.Err()
	again := time.NewTicker(queryTimeout)
	defer again.Stop()
	known := m.ask()
	for err == nil {
		select {
		case e, ok := <-c.Events():
			if !ok {
				err = c.Err()
				break
			}
			if err = m.event(e); e.Name == "STOP" || e.Name == "RESUME" {
				known = m.ask()
			}
		case <-again.C:
			m.trimLogs()
			if !known {
				known = m.ask()
			}
		case <-m.ctx.Done():
			err = m.ctx.Err()
		}
	}
	// Events that came with the end, such as SHUTDOWN, are still to be read.
	cerr := c.Close()
	for e := range c.Events() {
		if eerr := m.event(e); eerr != nil {
			err = errors.Join(err, eerr)
		}
	}
	m.setClient(nil)
	return errors.Join(err, cerr)
}

func (m *Machine) setClient(c *qmp.Client) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.client = c
	m.wake()
}

// wake tells those who wait for a client or a state; called with mu held.
func (m *Machine) wake() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// ask is refresh for follow: a QEMU that waits for a dead server answers
// late, and is asked again.
func (m *Machine) ask() bool {
	err := m.refresh(m.ctx)
	if err != nil && m.ctx.Err() == nil {
		m.note(err.Error())
	}
	return err == nil
}

// event handles one event of QEMU.
func (m *Machine) event(e qmp.Event) error {
	switch e.Name {
	case "STOP":
		// The CPUs stand still. Why, and when QEMU has done with the disks, is
		// asked next; a pause on request needs no waiting for that.
		m.mu.Lock()
		m.stopped = time.Now()
		m.mu.Unlock()
		if m.paused() {
			m.setState("paused")
		}
	case "MIGRATION": // its state is asked for by who waits
		m.mu.Lock()
		m.wake()
		m.mu.Unlock()
	case "BLOCK_IO_ERROR":
		var d struct {
			Reason string `json:"reason"`
		}
		if err := json.Unmarshal(e.Data, &d); err != nil {
			return status.Errorf(status.Unsupported, "QEMU's event BLOCK_IO_ERROR: %w", err)
		}
		m.note(fmt.Sprintf("a disk answered an error (%s); the guest waits until it is back", d.Reason))
	case "SHUTDOWN":
		var d struct {
			Reason string `json:"reason"`
		}
		if err := json.Unmarshal(e.Data, &d); err != nil {
			return status.Errorf(status.Unsupported, "QEMU's event SHUTDOWN: %w", err)
		}
		m.mu.Lock()
		m.shutdown = shutdownReason(d.Reason)
		m.mu.Unlock()
	}
	return nil
}

// shutdownReason puts QEMU's ShutdownCause into words.
func shutdownReason(cause string) string {
	switch cause {
	case "guest-shutdown":
		return "the guest powered off"
	case "guest-reset":
		return "the guest rebooted or panicked"
	case "guest-panic":
		return "the guest panicked"
	case "host-qmp-quit":
		return "stopped on request"
	case "host-signal":
		return "QEMU was ended by a signal"
	}
	return "QEMU ended: " + cause
}

// refresh asks QEMU for its state and wakes the healer if it is a bad one.
func (m *Machine) refresh(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, queryTimeout)
	defer cancel()
	var s struct {
		Status string `json:"status"`
	}
	if err := m.do(ctx, "query-status", nil, &s); err != nil {
		return err
	}
	m.setState(s.Status)
	return nil
}

// setState takes over QEMU's state and wakes the healer if it is a bad one.
func (m *Machine) setState(state string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if state == "io-error" && m.state != "io-error" {
		m.ioErrors++
	}
	m.state = state
	m.wake()
	if state != "io-error" {
		m.trouble = ""
	} else {
		select {
		case m.heal <- struct{}{}:
		default: // the healer has not looked since the last time
		}
	}
}

// do executes a command on the monitor, waiting for a connection if there is
// none at the moment.
func (m *Machine) do(ctx context.Context, command string, args, result any) error {
	for {
		if exit := m.Exit(); exit != "" {
			return status.Errorf(status.Unavailable, "VM %s has ended: %s", m.spec.Name, exit)
		}
		m.mu.Lock()
		c, changed := m.client, m.changed
		m.mu.Unlock()
		if c != nil {
			return c.Do(ctx, command, args, result)
		}
		select {
		case <-changed:
		case <-m.proc.done:
		case <-m.ctx.Done():
			if m.Exit() != "" {
				continue // the end is why
			}
			return status.Errorf(status.Shutdown, "VM %s is not watched by this process any more", m.spec.Name)
		case <-ctx.Done():
			return status.Errorf(status.Timeout, "VM %s: QEMU's monitor cannot be reached: %w", m.spec.Name, ctx.Err())
		}
	}
}

// awaitMonitor waits for the first answer after a start.
func (m *Machine) awaitMonitor(ctx context.Context) error { return m.do(ctx, "query-status", nil, nil) }

// note keeps what went wrong for Status.
func (m *Machine) note(text string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.trouble = text
}
