package kernel

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/vishvananda/netlink"

	"github.com/cairnstore/cairn/nbd/client"
)

// Keep dials connections that die again and tells the kernel when the volume
// has grown, until the device is detached (nil) or ctx ends. It may begin at
// any time, also after another Keep of the device was killed: what it needs to
// know is in the kernel. Two at once do no harm.
func Keep(ctx context.Context, cfg Config) error {
	if err := cfg.defaults(); err != nil {
		return err
	}
	f, err := family()
	if err != nil {
		return err
	}
	ev, err := subscribe(f)
	if err != nil {
		return err
	}
	k := &keeper{cfg: cfg, f: f, suspect: true}
	news, ended := make(chan struct{}, 1), make(chan error, 1)
	go func() { ended <- k.listen(ev, news) }()
	err = k.run(ctx, news)
	return errors.Join(err, ev.close(), ignoreClosed(<-ended))
}

func ignoreClosed(err error) error {
	if errors.Is(err, os.ErrClosed) {
		return nil
	}
	return err
}

type keeper struct {
	cfg Config
	f   *netlink.GenlFamily

	suspect bool // connections may be dead: to be found out
	away    bool // the server was not there at the last look
}

// listen passes the kernel's news on until the subscription is closed.
func (k *keeper) listen(ev *events, news chan<- struct{}) error {
	for {
		index, err := ev.dead()
		if err != nil {
			return err
		}
		if index != k.cfg.Index && index != -1 {
			continue
		}
		select {
		case news <- struct{}{}:
		default: // it will look anyway
		}
	}
}

func (k *keeper) run(ctx context.Context, news <-chan struct{}) error {
	t := time.NewTicker(followEvery)
	defer t.Stop()
	retry := time.NewTimer(0)
	defer retry.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-news:
			k.suspect = true
		case <-retry.C:
		case <-t.C:
		}
		up, err := connections(k.f)
		if err != nil {
			return err
		}
		if !up[k.cfg.Index] {
			k.cfg.Log.Info("device detached", "device", path(k.cfg.Index))
			return nil
		}
		switch err := k.look(ctx); {
		case err == nil:
			if k.away {
				k.cfg.Log.Info("server is back", "device", path(k.cfg.Index))
			}
			k.away = false
		case ctx.Err() != nil:
			return nil
		default:
			if !k.away {
				k.cfg.Log.Warn("server is away: requests wait", "device", path(k.cfg.Index), "for", k.cfg.DeadTimeout, "err", err)
			}
			k.away, k.suspect = true, true
			retry.Reset(reconnectEvery)
		}
	}
}

// reconnectEvery is how often a server that is away is tried. A gateway that
// was killed is back in well below a second.
const reconnectEvery = 100 * time.Millisecond

// look gives the kernel connections for the dead ones, and the size.
func (k *keeper) look(ctx context.Context) error {
	infoCtx, cancel := context.WithTimeout(ctx, dialWait)
	x, err := client.Info(infoCtx, k.cfg.URI, nil)
	cancel()
	if err != nil {
		return err
	}
	if k.suspect {
		if err := k.offer(ctx); err != nil {
			return err
		}
		k.suspect = false
	}
	now, err := sizeOf(k.cfg.Index)
	if err != nil || x.Size <= now {
		return err
	}
	m := message{family: k.f, cmd: cmdReconfigure}
	m.u32(attrIndex, uint32(k.cfg.Index))
	m.u64(attrSize, x.Size)
	m.identifier(k.cfg.URI)
	if _, err := m.do(); err != nil {
		return err
	}
	k.cfg.Log.Info("device has grown", "device", path(k.cfg.Index), "from", now, "to", x.Size)
	return nil
}

// offer gives the kernel as many connections as the device has. It puts them in
// the place of dead ones and lets go of the rest; which it did, it does not
// tell.
func (k *keeper) offer(ctx context.Context) error {
	files, _, err := dialAll(ctx, k.cfg)
	defer closeAll(files)
	if err != nil {
		return err
	}
	m := message{family: k.f, cmd: cmdReconfigure}
	m.u32(attrIndex, uint32(k.cfg.Index))
	m.seconds(attrDeadConn, k.cfg.DeadTimeout)
	m.sockets(files)
	m.identifier(k.cfg.URI)
	if _, err := m.do(); err != nil {
		return err
	}
	k.cfg.Log.Info("connections offered in the place of dead ones", "device", path(k.cfg.Index), "connections", len(files))
	return nil
}
