package gateway

import (
	"context"
	"strings"
	"time"

	nbdserver "github.com/cairnstore/cairn/nbd/server"

	"github.com/cairnstore/cairn/chunk/volume"
	"github.com/cairnstore/cairn/proto/status"
)

// Exports offers the attached volumes to an NBD server.
func (g *Gateway) Exports() nbdserver.Exports { return exports{g} }

type exports struct{ g *Gateway }

// asExport keeps a nil pointer from becoming an export.
func asExport(v *Volume, err error) (nbdserver.Volume, error) {
	if err != nil {
		return nil, err
	}
	return v, nil
}

// List returns the names of the volumes that can be opened.
func (x exports) List() []string {
	var out []string
	for _, v := range x.g.Volumes() {
		if v.State() != volume.Ended {
			out = append(out, v.name)
		}
	}
	return out
}

// Open returns an attached volume. After a restart it waits until what this
// host held is attached again.
func (x exports) Open(name string) (nbdserver.Volume, error) {
	t := time.NewTimer(openWait)
	defer t.Stop()
	select {
	case <-x.g.recovered:
	case <-t.C:
		return nil, status.Errorf(status.Unavailable, "host %s is still attaching the volumes it held: try again", x.g.cfg.Host)
	case <-x.g.ctx.Done():
		return nil, status.Errorf(status.Shutdown, "host %s is going away", x.g.cfg.Host)
	}
	if strings.Contains(name, "@") {
		ctx, cancel := context.WithTimeout(x.g.ctx, openWait)
		defer cancel()
		return asExport(x.g.Show(ctx, name))
	}
	o, err := x.g.open(name)
	if err != nil {
		return nil, err
	}
	if v, is := o.(*Volume); is && v.State() == volume.Ended {
		return nil, status.Errorf(status.Fenced, "volume %s is no longer attached on host %s: %s", name, x.g.cfg.Host, v.Info().Why)
	}
	return o, nil
}
