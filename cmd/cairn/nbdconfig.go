package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os/user"
	"slices"
	"strconv"
	"strings"

	nbdserver "github.com/cairnstore/cairn/nbd/server"
)

// nbdConfig is what a host's file says of its NBD server beyond the socket's
// path:
//
//	nbd_mode    = "0660"            # of the socket
//	nbd_owner   = "libvirt-qemu"    # name or number; default: who runs the host
//	nbd_group   = "kvm"
//	nbd_default = "boot"            # what a client gets that names no export
//
//	[nbd_tcp]
//	listen = "10.0.0.1:10809"
//	cert = "/etc/cairn/nbd.pem"     # all three are needed beyond loopback
//	key  = "/etc/cairn/nbd-key.pem"
//	ca   = "/etc/cairn/clients.pem"
//
//	[[nbd_tcp.client]]              # who may open what over TCP; nobody else may
//	name      = "vmhost-7.example"  # as the certificate has it: CN, DNS, URI or mail name
//	volumes   = ["db", "tenant-a.*"]
//	read_only = false
type nbdConfig struct {
	NBDMode    string        `toml:"nbd_mode,omitempty"`
	NBDOwner   string        `toml:"nbd_owner,omitempty"`
	NBDGroup   string        `toml:"nbd_group,omitempty"`
	NBDDefault string        `toml:"nbd_default,omitempty"`
	NBDTCP     *nbdTCPConfig `toml:"nbd_tcp,omitempty"`
}

type nbdTCPConfig struct {
	Listen  string            `toml:"listen"`
	Cert    string            `toml:"cert,omitempty"`
	Key     string            `toml:"key,omitempty"`
	CA      string            `toml:"ca,omitempty"`
	Clients []nbdClientConfig `toml:"client,omitempty"`
}

type nbdClientConfig struct {
	Name     string   `toml:"name"`
	Volumes  []string `toml:"volumes"`
	ReadOnly bool     `toml:"read_only,omitempty"`
}

func (c *nbdConfig) check() error {
	if _, err := c.socket(""); err != nil {
		return err
	}
	t := c.NBDTCP
	if t == nil {
		return nil
	}
	if err := checkAddr("nbd_tcp listen", t.Listen); err != nil {
		return err
	}
	given := 0
	for _, f := range []string{t.Cert, t.Key, t.CA} {
		if f != "" {
			given++
		}
	}
	host, _, _ := net.SplitHostPort(t.Listen) // checked above
	loopback := host == "localhost" || net.ParseIP(host).IsLoopback()
	switch {
	case given != 0 && given != 3:
		return fmt.Errorf("nbd_tcp needs cert, key and ca together")
	case given == 0 && !loopback:
		return fmt.Errorf("nbd_tcp listens on %s, beyond loopback: it needs cert, key and ca, since anybody on the network could read the volumes", t.Listen)
	case given == 0 && len(t.Clients) > 0:
		return fmt.Errorf("nbd_tcp tells clients apart by their certificates: it needs cert, key and ca")
	}
	for i, cl := range t.Clients {
		if cl.Name == "" || len(cl.Volumes) == 0 {
			return fmt.Errorf("client %d of nbd_tcp needs a name and volumes (\"*\" is all)", i+1)
		}
		for _, v := range cl.Volumes {
			if star := strings.IndexByte(v, '*'); star >= 0 && star != len(v)-1 {
				return fmt.Errorf("%q of client %s: a * can only stand at the end", v, cl.Name)
			}
		}
	}
	return nil
}

// socket is the unix socket with its mode and owner.
func (c *nbdConfig) socket(path string) (s nbdserver.Socket, err error) {
	s.Path = path
	if c.NBDMode != "" {
		m, err := strconv.ParseUint(c.NBDMode, 8, 32)
		if err != nil || m > 0o777 || m == 0 {
			return s, fmt.Errorf("nbd_mode = %q is not a mode like \"0660\"", c.NBDMode)
		}
		s.Mode = fs.FileMode(m)
	}
	if c.NBDOwner != "" {
		if s.UID, err = number(c.NBDOwner, func(n string) (string, error) {
			u, err := user.Lookup(n)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		}); err != nil {
			return s, fmt.Errorf("nbd_owner: %w", err)
		}
	}
	if c.NBDGroup != "" {
		if s.GID, err = number(c.NBDGroup, func(n string) (string, error) {
			g, err := user.LookupGroup(n)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		}); err != nil {
			return s, fmt.Errorf("nbd_group: %w", err)
		}
	}
	return s, nil
}

// number is an id given as a number or a name.
func number(s string, lookup func(string) (string, error)) (int, error) {
	if n, err := strconv.ParseUint(s, 10, 31); err == nil {
		return int(n), nil
	}
	id, err := lookup(s)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(id)
}

// allow is the server's rule of who may open what. Who reaches the unix socket
// may do everything: its mode and owner are the rule there. So may everybody
// on loopback where no clients are listed.
func (c *nbdConfig) allow(who nbdserver.Identity, export string) nbdserver.Access {
	if who.Local || len(c.NBDTCP.Clients) == 0 {
		return nbdserver.AccessFull
	}
	access := nbdserver.AccessNone
	for _, cl := range c.NBDTCP.Clients {
		if !slices.Contains(who.Names, cl.Name) || !slices.ContainsFunc(cl.Volumes, func(p string) bool { return matches(p, export) }) {
			continue
		}
		if !cl.ReadOnly {
			return nbdserver.AccessFull
		}
		access = nbdserver.AccessRead
	}
	return access
}

// matches says whether a volume's pattern fits an export. A volume's snapshots
// come with it.
func matches(pattern, export string) bool {
	volume, _, _ := strings.Cut(export, "@")
	if prefix, ok := strings.CutSuffix(pattern, "*"); ok {
		return strings.HasPrefix(volume, prefix)
	}
	return volume == pattern || export == pattern
}

// nbdSocketName is what a supervisor, or a systemd socket unit, calls the NBD
// socket it passes (FileDescriptorName=nbd).
const nbdSocketName = "nbd"

// listenNBD is the NBD socket this process was given, else one of its own.
func (c *hostConfig) listenNBD() (net.Listener, error) {
	l, err := nbdserver.Inherited(nbdSocketName)
	if l != nil || err != nil {
		return l, err
	}
	s, err := c.socket(c.NBD)
	if err != nil {
		return nil, err
	}
	return nbdserver.ListenUnix(s)
}

// serveNBD starts the host's NBD server on its sockets.
func (h *hostd) serveNBD() error {
	sc := nbdserver.Config{Exports: h.gw.Exports(), Default: h.cfg.NBDDefault, Log: h.log}
	tcp := h.cfg.NBDTCP
	if tcp != nil {
		sc.Allow = h.cfg.nbdConfig.allow
		if tcp.Cert != "" {
			conf, err := nbdserver.LoadTLS(nbdserver.Files{Cert: tcp.Cert, Key: tcp.Key, CA: tcp.CA})
			if err != nil {
				return err
			}
			sc.TLS = conf
		}
	}
	h.nbd = nbdserver.New(sc)
	h.undo = append(h.undo, func() error {
		ctx, cancel := context.WithTimeout(context.Background(), closeWait)
		defer cancel()
		return errors.Join(h.nbd.Close(ctx), h.gw.Close(ctx))
	})
	l, err := h.cfg.listenNBD()
	if err != nil {
		return err
	}
	go h.served("NBD server", func() error { return h.nbd.Serve(l) })
	if tcp == nil {
		return nil
	}
	tl, err := nbdserver.ListenTCP(tcp.Listen)
	if err != nil {
		return err
	}
	go h.served("NBD server on TCP", func() error { return h.nbd.Serve(tl) })
	return nil
}
