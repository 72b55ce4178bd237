package agent

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/cairnstore/cairn/proto/pb"
	"github.com/cairnstore/cairn/proto/status"
	"github.com/cairnstore/cairn/vmhook/machine"
)

// attachEvery is how long an adopted machine whose volumes could not be
// attached waits for the next attempt.
const attachEvery = time.Second

// Adopt takes over the machines that an earlier host process has started, and
// attaches their volumes again, so that they find their disks. It returns the
// names of those that run. The ones that ended meanwhile are reported to
// OnExit. A machine that cannot be adopted does not keep the others from it,
// and volumes that cannot be attached are tried again until their machine ends.
func (a *Agent) Adopt(ctx context.Context) ([]string, error) {
	dir, err := filepath.Abs(a.cfg.Dir)
	if err != nil {
		return nil, status.Errorf(status.IO, "VM directory: %w", err)
	}
	names, err := machine.List(dir)
	if err != nil {
		return nil, err
	}
	var adopted []string
	var waiting []*vm
	var failed error
	for _, name := range names {
		e, err := a.adopt(dir, name)
		if err != nil {
			failed = errors.Join(failed, fmt.Errorf("adopt VM %s: %w", name, err))
		}
		if e != nil {
			adopted = append(adopted, name)
			if !e.m.Arriving() { // whether its volumes come here is not decided
				waiting = append(waiting, e)
			}
		}
	}
	// All machines are known from here on; attaching may take its time.
	for _, e := range waiting {
		if err := a.reattach(ctx, e); err != nil {
			failed = errors.Join(failed, fmt.Errorf("adopt VM %s: %w", e.name, err))
			a.mu.Lock()
			if !a.closed {
				a.wg.Add(1)
				go a.keepAttaching(e)
			}
			a.mu.Unlock()
		}
	}
	return adopted, failed
}

// adopt enters a running machine; nil when there is none.
func (a *Agent) adopt(dir, name string) (*vm, error) {
	m, err := machine.Find(dir, name)
	if errors.Is(err, status.NotFound) {
		return nil, a.bury(dir, name)
	}
	if err != nil {
		return nil, err
	}
	v := &pb.VM{Name: name}
	for _, d := range m.Spec().Disks {
		v.Disks = append(v.Disks, d.Name)
	}
	e, err := a.reserve(v)
	if err != nil {
		m.Release()
		return nil, err
	}
	// The machine is ours, with or without its disks: it waits for them, and
	// can be stopped.
	a.watch(e, m)
	return e, nil
}

// reattach attaches an adopted machine's volumes, unless it ends meanwhile.
func (a *Agent) reattach(ctx context.Context, e *vm) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() {
		select {
		case <-e.m.Done():
			cancel()
		case <-ctx.Done():
		}
	}()
	e.attaching.Lock()
	defer e.attaching.Unlock()
	var failed error
	for _, d := range e.m.Spec().Disks {
		if e.detached {
			return nil // it has ended meanwhile
		}
		uri, err := a.cfg.Volumes.Attach(ctx, d.Name)
		switch {
		case err != nil:
			failed = errors.Join(failed, fmt.Errorf("attach volume %s: %w", d.Name, err))
		case uri != d.URI:
			failed = errors.Join(failed, status.Errorf(status.Conflict, "volume %s is now at %s, and the VM looks for it at %s; stop and start the VM", d.Name, uri, d.URI))
		}
	}
	return failed
}

// keepAttaching tries again until an adopted machine has its disks: it may
// have been found before the metadata service was.
func (a *Agent) keepAttaching(e *vm) {
	defer a.wg.Done()
	last := ""
	for {
		select {
		case <-time.After(attachEvery):
		case <-e.m.Done():
			return
		case <-a.ctx.Done():
			return
		}
		err := a.reattach(a.ctx, e)
		if err == nil {
			a.cfg.Log.Info("an adopted VM has its disks again", "vm", e.name)
			return
		}
		if text := err.Error(); text != last && a.ctx.Err() == nil && e.m.Exit() == "" {
			a.cfg.Log.Warn("an adopted VM waits for its disks", "vm", e.name, "err", err)
			last = text
		}
	}
}

// Rebooted is why a machine ended that ran when its host was restarted.
const Rebooted = "its host was restarted"

// bury does what watch does for a machine that ended while nobody watched.
func (a *Agent) bury(dir, name string) error {
	why := "it ended while the host process was away"
	again, berr := machine.Rebooted(dir, name)
	if again {
		why = Rebooted
	}
	volumes, err := machine.Volumes(dir, name)
	if err = errors.Join(err, berr); err == nil {
		err = errors.Join(a.detach(volumes), machine.Forget(dir, name))
	}
	a.report(name, why, err)
	return err
}
