package server_test

import (
	"context"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd"
	"github.com/cairnstore/cairn/nbd/client"
	"github.com/cairnstore/cairn/nbd/server"
	"github.com/cairnstore/cairn/proto/status"
)

// TestExportsByIdentity: a certificate opens what it is for, and learns of
// nothing else.
func TestExportsByIdentity(t *testing.T) {
	a := newAuthority(t)
	m := newMemory(1 << 20)
	allow := func(who server.Identity, export string) server.Access {
		switch {
		case who.Local && export != "secret":
			return server.AccessFull
		case slices.Contains(who.Names, "localhost") && export == "mine":
			return server.AccessFull
		case slices.Contains(who.Names, "localhost") && export == "shown":
			return server.AccessRead
		}
		return server.AccessNone
	}
	s := serve(t, server.Config{Exports: exports{"mine": m, "shown": m, "other": m, "secret": m}, TLS: a.serverConfig(t), Allow: allow, Default: "mine"})
	ctx := context.Background()
	for _, x := range []struct {
		uri    string
		tls    bool
		listed []string
	}{{s.tcpURI(""), true, []string{"mine", "shown"}}, {s.tcpURI(""), false, nil}, {s.uri(""), false, []string{"mine", "other", "shown"}}} {
		conf := a.clientConfig(t)
		if !x.tls {
			conf = nil
		}
		names, err := client.List(ctx, x.uri, conf)
		must(t, err)
		slices.Sort(names)
		if !slices.Equal(names, x.listed) {
			t.Errorf("%s with TLS %v lists %q, want %q", x.uri, x.tls, names, x.listed)
		}
	}
	if c := dial(t, s.tcpURI("mine"), a.clientConfig(t)); c.Info().Flags&nbd.ReadOnly != 0 {
		t.Error("its own export is read only")
	}
	c := dial(t, s.tcpURI("shown"), a.clientConfig(t))
	if c.Info().Flags&nbd.ReadOnly == 0 || c.Info().Flags&(nbd.SendTrim|nbd.SendWriteZeroes) != 0 {
		t.Errorf("flags %#x of an export that is only to be read", c.Info().Flags)
	}
	wantKind(t, do(c, &client.Req{Type: nbd.CmdWrite, Data: make([]byte, 4)}), status.Permission)
	for _, name := range []string{"other", "secret", "nothing"} { // whether it is there is not told
		_, err := client.Dial(ctx, s.tcpURI(name), a.clientConfig(t))
		wantKind(t, err, status.Permission)
	}
	_, err := client.Dial(ctx, s.tcpURI("mine"), nil) // nobody, without a certificate
	wantKind(t, err, status.Permission)
	_, err = client.Dial(ctx, s.uri("secret"), nil)
	wantKind(t, err, status.Permission)
}

// TestDefaultExport: the empty name is the default export in every option.
func TestDefaultExport(t *testing.T) {
	s := serve(t, server.Config{Exports: exports{"v": newMemory(3 << 20)}, Default: "v"})
	c := dial(t, s.uri(""), nil)
	if c.Size() != 3<<20 || !c.HasBlockStatus() {
		t.Errorf("opened %+v, describes allocation: %v", c.Info(), c.HasBlockStatus())
	}
	if _, err := c.BlockStatus(0, 1<<20); err != nil {
		t.Error(err)
	}
	if n := s.Conns("v"); n != 1 {
		t.Errorf("%d connections of the volume it names", n)
	}
	x, err := client.Info(context.Background(), s.uri(""), nil)
	must(t, err)
	if x.Name != "v" {
		t.Errorf("the default export calls itself %q", x.Name)
	}
	nc := greeted(t, raw(t, "unix", s.sock))
	mustWrite(t, nc, nbd.AppendOption(nil, nbd.OptExportName, nil))
	if b := mustRead(t, nc, make([]byte, nbd.OldExportSize)); be.Uint64(b) != 3<<20 {
		t.Errorf("EXPORT_NAME of the default export: % x", b)
	}
	none := serve(t, server.Config{Exports: exports{"v": newMemory(3 << 20)}})
	_, err = client.Dial(context.Background(), none.uri(""), nil)
	wantKind(t, err, status.NotFound)
}

// TestCertificatesAreReadAgain: rotated files count from the next handshake,
// broken ones change nothing.
func TestCertificatesAreReadAgain(t *testing.T) {
	first, second := newAuthority(t), newAuthority(t)
	dir := t.TempDir()
	f := server.Files{Cert: filepath.Join(dir, "cert"), Key: filepath.Join(dir, "key"), CA: filepath.Join(dir, "ca")}
	at := time.Now().Add(-time.Hour)
	put := func(a *authority) {
		der, key := a.issue(t)
		raw, err := x509.MarshalPKCS8PrivateKey(key)
		must(t, err)
		at = at.Add(time.Minute)
		for path, b := range map[string]*pem.Block{f.Cert: {Type: "CERTIFICATE", Bytes: der}, f.Key: {Type: "PRIVATE KEY", Bytes: raw}, f.CA: {Type: "CERTIFICATE", Bytes: a.der}} {
			must(t, os.WriteFile(path, pem.EncodeToMemory(b), 0o600))
			must(t, os.Chtimes(path, at, at))
		}
	}
	if _, err := server.LoadTLS(f); !errors.Is(err, status.Invalid) {
		t.Errorf("no files: %v", err)
	}
	put(first)
	conf, err := server.LoadTLS(f)
	must(t, err)
	s := serve(t, server.Config{Exports: exports{"v": newMemory(1 << 20)}, TLS: conf})
	try := func(a *authority) error {
		c, err := client.Dial(context.Background(), s.tcpURI("v"), a.clientConfig(t))
		if err != nil {
			return err
		}
		return c.Close()
	}
	must(t, try(first))
	if try(second) == nil {
		t.Error("a client of another authority was let in")
	}
	must(t, os.WriteFile(f.Key, []byte("half"), 0o600))
	must(t, try(first))
	put(second)
	must(t, try(second))
	if try(first) == nil {
		t.Error("the old authority's client is still let in")
	}
}
