package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/cairnstore/cairn/nbd/client"
)

// authority issues certificates into files of a directory.
type authority struct {
	t    *testing.T
	dir  string
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, dir string) *authority {
	t.Helper()
	a := &authority{t: t, dir: dir}
	a.cert = &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "authority"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a.key = a.write("ca", a.cert, nil)
	return a
}

// write signs cert, by itself if there is no authority yet, and keeps it with
// its key in the files name.pem and name-key.pem.
func (a *authority) write(name string, cert *x509.Certificate, by *ecdsa.PrivateKey) *ecdsa.PrivateKey {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	if by == nil {
		by = key
	}
	der, err := x509.CreateCertificate(rand.Reader, cert, a.cert, &key.PublicKey, by)
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	for file, b := range map[string]*pem.Block{name + ".pem": {Type: "CERTIFICATE", Bytes: der}, name + "-key.pem": {Type: "PRIVATE KEY", Bytes: raw}} {
		if err := os.WriteFile(filepath.Join(a.dir, file), pem.EncodeToMemory(b), 0o600); err != nil {
			a.t.Fatal(err)
		}
	}
	return key
}

// issue makes a certificate of this common name, for both sides on loopback.
func (a *authority) issue(name string) {
	a.write(name, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: name}, NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}, a.key)
}

// as is a client's side with the named certificate; "": none.
func (a *authority) as(name string) *tls.Config {
	a.t.Helper()
	ca, err := os.ReadFile(filepath.Join(a.dir, "ca.pem"))
	if err != nil {
		a.t.Fatal(err)
	}
	c := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	c.RootCAs.AppendCertsFromPEM(ca)
	if name != "" {
		pair, err := tls.LoadX509KeyPair(filepath.Join(a.dir, name+".pem"), filepath.Join(a.dir, name+"-key.pem"))
		if err != nil {
			a.t.Fatal(err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c
}

// A host that serves NBD over TCP, as its file says: who has a certificate
// opens what is written beside its name there, and nobody else anything, now
// and after a restart.
func TestNBDOverTLS(t *testing.T) {
	m := newMachines(t)
	for n := 1; n <= 3; n++ {
		m.config("meta.toml", n)
		m.start(fmt.Sprintf("meta-%d", n))
	}
	a := newAuthority(t, m.dir)
	for _, name := range []string{"server", "db-host", "auditor", "stranger"} {
		a.issue(name)
	}
	other := newAuthority(t, t.TempDir())
	other.issue("db-host")
	ports, err := freePorts(1)
	if err != nil {
		t.Fatal(err)
	}
	in := func(file string) string { return filepath.Join(m.dir, file) }
	m.config("host.toml", 1, "[nbd_tcp]", fmt.Sprintf("listen = %q", ports[0]),
		fmt.Sprintf("cert = %q\nkey = %q\nca = %q", in("server.pem"), in("server-key.pem"), in("ca.pem")),
		"[[nbd_tcp.client]]\nname = \"db-host\"\nvolumes = [\"db\", \"tenant-a.*\"]",
		"[[nbd_tcp.client]]\nname = \"auditor\"\nvolumes = [\"*\"]\nread_only = true")
	m.start("host-1")
	for _, v := range []string{"db", "mail"} {
		m.ok("volume", "create", v, "--size", "64M", "--replicas", "1")
		m.ok("volume", "attach", v)
	}
	uri := func(v string) string { return "nbds://" + ports[0] + "/" + v }
	open := func(v string, conf *tls.Config) (*client.Client, error) {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		return client.Dial(ctx, uri(v), conf)
	}
	forged := other.as("db-host")
	forged.RootCAs = a.as("").RootCAs // it trusts the server
	want := bytes.Repeat([]byte("cairn"), 4096)
	for round := range 2 {
		db, err := open("db", a.as("db-host"))
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if _, err := db.WriteAt(want, 4096); err != nil {
			t.Fatal(err)
		}
		reader, err := open("db", a.as("auditor"))
		if err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := reader.ReadAt(got, 4096); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("another client reads something else: %v", err)
		}
		if _, err := reader.WriteAt(want, 0); err == nil {
			t.Error("a client that may only read has written")
		}
		for _, c := range []*client.Client{db, reader} {
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		for what, conf := range map[string]*tls.Config{"no certificate": a.as(""), "a certificate of nobody in the file": a.as("stranger"),
			"the right name by another authority": forged} {
			if _, err := open("db", conf); err == nil {
				t.Errorf("a client with %s was let in", what)
			}
		}
		if _, err := open("mail", a.as("db-host")); err == nil {
			t.Error("a client opened a volume that is not its own")
		}
		m.stop("host-1", syscall.SIGTERM)
		if round == 0 {
			m.start("host-1")
		}
	}
}
