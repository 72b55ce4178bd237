package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	nbdserver "github.com/cairnstore/cairn/nbd/server"
)

const hostToml = `
name = "h"
dir = "/d"
cluster = "c"
meta = ["127.0.0.1:1"]
data = "127.0.0.1:2"
control = "127.0.0.1:3"
nbd_mode = "0666"
nbd_owner = "root"
nbd_group = "12"
nbd_default = "boot"
[[store]]
path = "/d/s"
[nbd_tcp]
listen = "10.0.0.1:10809"
cert = "c"
key = "k"
ca = "a"
[[nbd_tcp.client]]
name = "web"
volumes = ["db", "tenant-a.*"]
[[nbd_tcp.client]]
name = "backup"
volumes = ["*"]
read_only = true
`

func TestNBDConfig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "h.toml")
	load := func(text string) (*hostConfig, error) {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return loadHostConfig(path)
	}
	c, err := load(hostToml)
	if err != nil {
		t.Fatal(err)
	}
	if err := writeConfig(path, c); err != nil {
		t.Fatal(err)
	}
	if c, err = loadHostConfig(path); err != nil { // as it was written
		t.Fatal(err)
	}
	if s, err := c.socket("/s"); err != nil || s != (nbdserver.Socket{Path: "/s", Mode: 0o666, GID: 12}) {
		t.Errorf("socket %+v, %v", s, err)
	}
	if c.NBDDefault != "boot" || len(c.NBDTCP.Clients) != 2 {
		t.Errorf("%+v %+v", c.nbdConfig, c.NBDTCP)
	}
	who := func(names ...string) nbdserver.Identity { return nbdserver.Identity{Names: names} }
	for _, x := range []struct {
		who    nbdserver.Identity
		export string
		want   nbdserver.Access
	}{
		{who("web"), "db", nbdserver.AccessFull},
		{who("web"), "db@monday", nbdserver.AccessFull},
		{who("x", "web"), "tenant-a.1", nbdserver.AccessFull},
		{who("web"), "tenant-b.1", nbdserver.AccessNone},
		{who("web"), "dbx", nbdserver.AccessNone},
		{who("backup"), "db", nbdserver.AccessRead},
		{who("backup", "web"), "db", nbdserver.AccessFull},
		{who("somebody"), "db", nbdserver.AccessNone},
		{who(), "db", nbdserver.AccessNone},
		{nbdserver.Identity{Local: true}, "anything", nbdserver.AccessFull},
	} {
		if got := c.allow(x.who, x.export); got != x.want {
			t.Errorf("%+v to %s: %d, want %d", x.who, x.export, got, x.want)
		}
	}
	for says, change := range map[string][2]string{
		"beyond loopback":         {"cert = \"c\"\nkey = \"k\"\nca = \"a\"", ""},
		"cert, key and ca":        {"ca = \"a\"", ""},
		"not a mode":              {"0666", "rw"},
		"nbd_owner":               {`"root"`, `"nobody-of-this-name"`},
		"is not host:port":        {"10.0.0.1:10809", "10.0.0.1"},
		"only stand at the end":   {"tenant-a.*", "*-a"},
		"needs a name":            {`"web"`, `""`},
		"by their certificates":   {"listen = \"10.0.0.1:10809\"\ncert = \"c\"\nkey = \"k\"\nca = \"a\"", "listen = \"127.0.0.1:1\""},
		"is not a setting: is it": {"nbd_mode", "nbd_moode"},
	} {
		if _, err := load(strings.Replace(hostToml, change[0], change[1], 1)); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q for %q: %v, want %q", change[1], change[0], err, says)
		}
	}
}
