import java.io.*;
import java.lang.reflect.*;
import java.math.BigDecimal;
import java.nio.charset.StandardCharsets;
import java.sql.*;
import java.util.*;
import java.util.concurrent.*;
import org.postgresql.PGConnection;
import org.postgresql.PGStatement;
import org.postgresql.copy.*;
import org.postgresql.largeobject.*;
import org.postgresql.util.PSQLException;

/**
 * pgjdbc: what applications on the JVM do. One line a test, as the other suites print them.
 *
 * <p>A test is a method without parameters whose name begins with "test". What it is NOT: no test of pools or of an ORM.
 */
public class Jdbc {
    static final long LIMIT_SECONDS = 60;
    static final String HOST = System.getenv("PGHOST") + ":" + System.getenv("PGPORT");
    static final String DATABASE = System.getenv("PGDATABASE");
    static final String PASSWORD = System.getenv("APP_PASSWORD");
    static final String CERTIFICATE = System.getenv("CERTIFICATE");

    interface Action {
        void run() throws Exception;
    }

    public static void main(String[] names) throws Exception {
        DriverManager.setLoginTimeout(50);
        ExecutorService threads = Executors.newCachedThreadPool();
        List<Method> tests = new ArrayList<>();
        for (Method method : Jdbc.class.getDeclaredMethods()) {
            String name = method.getName();
            boolean chosen = names.length == 0 ? name.startsWith("test") : Arrays.asList(names).contains(name);
            if (method.getParameterCount() == 0 && chosen) {
                tests.add(method);
            }
        }
        tests.sort(Comparator.comparing(Method::getName));
        for (Method test : tests) {
            Future<?> running = threads.submit(() -> test.invoke(null));
            String why = null;
            try {
                running.get(LIMIT_SECONDS, TimeUnit.SECONDS);
            } catch (TimeoutException error) {
                why = "hangs: not over within " + LIMIT_SECONDS + " s";
            } catch (ExecutionException error) {
                Throwable cause = error.getCause();
                while (cause instanceof InvocationTargetException) {
                    cause = cause.getCause();
                }
                why = cause.toString();
                for (StackTraceElement place : cause.getStackTrace()) {
                    why += "Jdbc".equals(place.getClassName()) ? " line " + place.getLineNumber() : "";
                }
            }
            String line = why == null ? "ok " + test.getName() : "not ok " + test.getName() + ": " + why;
            System.out.println(line.replace('\n', ' '));
        }
        System.out.flush();
        Runtime.getRuntime().halt(0);
    }

    /** The admin console: run by its name, because PostgreSQL itself has none. */
    static void console() throws Exception {
        for (String mode : new String[] {"extended", "simple", "extendedForPrepared"}) {
            Properties all = new Properties();
            all.setProperty("user", "trusty");
            all.setProperty("sslmode", "disable");
            all.setProperty("preferQueryMode", mode);
            all.setProperty("prepareThreshold", "2");
            try (Connection connection = DriverManager.getConnection("jdbc:postgresql://" + HOST + "/portcullis", all)) {
                for (int round = 0; round < 4; round++) {
                    try (PreparedStatement nodes = connection.prepareStatement("SHOW NODES");
                            ResultSet rows = nodes.executeQuery()) {
                        rows.next();
                        if (!rows.getString("name").equals("alp") || rows.getDouble("weight") != 0.5
                                || !rows.getBoolean("attached") || rows.getLong("port") != 5432) {
                            throw new AssertionError(mode + ": " + rows.getString("name"));
                        }
                    }
                }
                try (Statement statement = connection.createStatement()) {
                    statement.execute("RESUME");
                    if (statement.getWarnings() == null) {
                        throw new AssertionError(mode + ": nothing was said");
                    }
                    statement.setFetchSize(2);
                    connection.setAutoCommit(false);
                    int count = 0;
                    try (ResultSet rows = statement.executeQuery("SHOW LISTS")) {
                        while (rows.next()) {
                            count++;
                        }
                    }
                    connection.commit();
                    connection.setAutoCommit(true);
                    if (count < 5 || !connection.isValid(10)) {
                        throw new AssertionError(mode + ": " + count);
                    }
                    try {
                        statement.execute("select now()");
                        throw new AssertionError(mode + ": SQL was run");
                    } catch (PSQLException error) {
                        if (!error.getSQLState().equals("0A000")) {
                            throw error;
                        }
                    }
                }
            }
        }
    }

    // What tests are made of.

    static Connection connect(String... options) throws SQLException {
        Properties all = new Properties();
        all.setProperty("user", "trusty");
        all.setProperty("sslmode", "disable");
        for (int at = 0; at < options.length; at += 2) {
            all.setProperty(options[at], options[at + 1]);
        }
        return DriverManager.getConnection("jdbc:postgresql://" + HOST + "/" + DATABASE, all);
    }

    static void run(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement()) {
            statement.execute(sql);
        }
    }

    static String one(Connection connection, String sql) throws SQLException {
        try (Statement statement = connection.createStatement(); ResultSet row = statement.executeQuery(sql)) {
            check(row.next(), "no row");
            return row.getString(1);
        }
    }

    static void check(boolean is, Object why) {
        if (!is) {
            throw new AssertionError(String.valueOf(why));
        }
    }

    static void same(Object found, Object expected) {
        check(Objects.equals(found, expected), found + " is not " + expected);
    }

    static SQLException fails(String state, Action action) throws Exception {
        try {
            action.run();
        } catch (SQLException error) {
            check(state.equals(error.getSQLState()), error.getSQLState() + ", not " + state + ": " + error.getMessage());
            return error;
        }
        throw new AssertionError("does not fail with " + state);
    }

    /** Other clients in between: where backends are shared they take some. */
    static void interfere() throws SQLException {
        try (Connection a = connect(); Connection b = connect()) {
            a.setAutoCommit(false);
            one(a, "select 1");
            one(b, "select 2");
            a.rollback();
        }
    }

    /** While another client has the very backend that this one last used. */
    static void taken(Connection connection, Action action) throws Exception {
        taken(one(connection, "select pg_backend_pid()"), action);
    }

    /** While another client has this backend. */
    static void taken(String wanted, Action action) throws Exception {
        boolean shared = Arrays.asList("transaction", "pgbouncer").contains(System.getenv("TARGET"));
        List<Connection> thieves = new ArrayList<>();
        try {
            boolean found = !shared;
            while (!found && thieves.size() < 35) {
                Connection thief = connect();
                thieves.add(thief);
                thief.setAutoCommit(false);
                found = one(thief, "select pg_backend_pid()").equals(wanted);
            }
            check(found, "no other client gets its backend");
            action.run();
        } finally {
            for (Connection thief : thieves) {
                thief.close();
            }
        }
    }

    /** Waits until a statement with this mark runs. */
    static void untilActive(String mark) throws Exception {
        long deadline = System.nanoTime() + TimeUnit.SECONDS.toNanos(40);
        try (Connection connection = connect()) {
            // Only here: what was abandoned directly runs on beside this.
            String sql = "select count(*) from pg_stat_activity where state = 'active' and query like '%" + mark
                    + "%' and pid <> pg_backend_pid() and datname = current_database()";
            while (!one(connection, sql).equals("1")) {
                check(System.nanoTime() < deadline, "never active: " + mark);
                Thread.sleep(20);
            }
        }
    }

    static int count(ResultSet rows) throws SQLException {
        int count = 0;
        while (rows.next()) {
            same(rows.getInt(1), ++count);
        }
        return count;
    }

    // Logins and the connection's own settings.

    static void testLoginWithPassword() throws Exception {
        try (Connection connection = connect("user", "app", "password", PASSWORD)) {
            same(one(connection, "select session_user"), "app");
        }
        fails("28P01", () -> connect("user", "app", "password", "wrong").close());
    }

    static void testTls() throws Exception {
        String[] modes = {"require", "verify-ca"};
        for (String mode : modes) {
            try (Connection connection =
                    connect("sslmode", mode, "sslrootcert", CERTIFICATE, "user", "app", "password", PASSWORD)) {
                same(one(connection, "select repeat('x', 100000)").length(), 100000);
            }
        }
        // The certificate is no other's.
        fails("08006", () -> connect("sslmode", "verify-ca", "sslrootcert", "/etc/ssl/certs/ca-certificates.crt").close());
    }

    static void testTlsCancel() throws Exception {
        try (Connection connection = connect("sslmode", "require"); Statement statement = connection.createStatement()) {
            cancelled(statement, "tls_cancel");
            same(one(connection, "select 7"), "7");
        }
    }

    static void testStartupParameters() throws Exception {
        try (Connection connection = connect("options", "-c statement_timeout=54321 -c work_mem=5MB", "ApplicationName",
                "jdbc suite", "currentSchema", "pg_catalog")) {
            interfere();
            same(one(connection, "show statement_timeout"), "54321ms");
            same(one(connection, "show work_mem"), "5MB");
            same(one(connection, "show application_name"), "jdbc suite");
            same(connection.getSchema(), "pg_catalog");
        }
    }

    static void testTargetServerType() throws Exception {
        // Nobody listens on port 1; the driver goes on to the next and asks it whether it is read only.
        String url = "jdbc:postgresql://127.0.0.1:1," + HOST + "/" + DATABASE + "?sslmode=disable&user=trusty";
        try (Connection connection = DriverManager.getConnection(url + "&targetServerType=primary")) {
            same(one(connection, "select 1"), "1");
        }
        fails("08001", () -> DriverManager.getConnection(url + "&targetServerType=secondary").close());
    }

    static void testQueryModes() throws Exception {
        for (String mode : new String[] {"simple", "extended", "extendedForPrepared", "extendedCacheEverything"}) {
            try (Connection connection = connect("preferQueryMode", mode, "prepareThreshold", "2")) {
                for (int turn = 1; turn < 8; turn++) {
                    try (PreparedStatement statement = connection.prepareStatement("select ?::int + 1, ?::text")) {
                        statement.setInt(1, turn);
                        statement.setString(2, "it's " + turn);
                        ResultSet row = statement.executeQuery();
                        check(row.next(), "no row");
                        same(row.getInt(1), turn + 1);
                        same(row.getString(2), "it's " + turn);
                    }
                    same(one(connection, "select 'plain'"), "plain");
                    interfere();
                }
            }
        }
    }

    static void testSessionSettings() throws Exception {
        try (Connection connection = connect(); Connection other = connect()) {
            connection.setTransactionIsolation(Connection.TRANSACTION_SERIALIZABLE);
            connection.setClientInfo("ApplicationName", "renamed");
            connection.setSchema("pg_catalog");
            run(connection, "set datestyle to 'ISO, DMY'; set timezone to 'Asia/Tokyo'");
            interfere();
            same(one(other, "show transaction_isolation"), "read committed");
            same(one(other, "show application_name"), "PostgreSQL JDBC Driver");
            same(connection.getTransactionIsolation(), Connection.TRANSACTION_SERIALIZABLE);
            same(one(connection, "show application_name"), "renamed");
            same(connection.getSchema(), "pg_catalog");
            same(one(connection, "show timezone"), "Asia/Tokyo");
        }
    }

    static void testReadOnly() throws Exception {
        for (String mode : new String[] {"transaction", "always"}) {
            try (Connection connection = connect("readOnlyMode", mode)) {
                run(connection, "create table if not exists read_only_here(n int)");
                connection.setReadOnly(true);
                connection.setAutoCommit(false);
                fails("25006", () -> run(connection, "insert into read_only_here values (1)"));
                connection.rollback();
                interfere();
                connection.setAutoCommit(true);
                connection.setReadOnly(false);
                run(connection, "insert into read_only_here values (1)");
            }
        }
    }

    static void testIsValidAndAbort() throws Exception {
        try (Connection connection = connect()) {
            check(connection.isValid(50), "is not valid");
        }
        Connection gone = connect();
        Thread running = new Thread(() -> {
            try {
                run(gone, "select pg_sleep(600) /* abort_me */");
            } catch (SQLException expected) {
                // It is ended below.
            }
        });
        running.start();
        untilActive("abort_me");
        gone.abort(Runnable::run);
        running.join();
        check(!gone.isValid(1), "is valid still");
        interfere();
    }

    // Statements.

    static void testPrepareThreshold() throws Exception {
        for (String threshold : new String[] {"0", "1", "5", "-1"}) {
            try (Connection connection = connect("prepareThreshold", threshold);
                    PreparedStatement statement = connection.prepareStatement("select ?::int8 * 2")) {
                for (long turn = 0; turn < 12; turn++) {
                    statement.setLong(1, turn);
                    ResultSet row = statement.executeQuery();
                    check(row.next(), "no row");
                    same(row.getLong(1), turn * 2);
                    if (turn % 4 == 0) {
                        interfere();
                    }
                }
                boolean named = statement.unwrap(PGStatement.class).isUseServerPrepare();
                same(named, !threshold.equals("0"));
            }
        }
    }

    static void testMoreStatementsThanTheCacheHolds() throws Exception {
        try (Connection connection = connect("prepareThreshold", "1", "preparedStatementCacheQueries", "10")) {
            for (int turn = 0; turn < 900; turn++) {
                int n = turn % 450;
                try (PreparedStatement statement = connection.prepareStatement("select ?::int + " + n)) {
                    statement.setInt(1, 1000);
                    ResultSet row = statement.executeQuery();
                    check(row.next(), "no row");
                    same(row.getInt(1), 1000 + n);
                }
            }
        }
    }

    /** The statements of one connection, at work on many backends. */
    static void testManyClients() throws Exception {
        try (Connection connection = connect()) {
            run(connection, "create table purse(id int primary key, held int not null);"
                    + "insert into purse select n, 100 from generate_series(0, 9) n");
        }
        ExecutorService threads = Executors.newFixedThreadPool(12);
        List<Future<Void>> all = new ArrayList<>();
        for (int thread = 0; thread < 12; thread++) {
            Random random = new Random(thread);
            all.add(threads.submit(() -> {
                try (Connection connection = connect("prepareThreshold", "1")) {
                    connection.setAutoCommit(false);
                    for (int turn = 0; turn < 60; turn++) {
                        int from = random.nextInt(9);
                        int to = from + 1 + random.nextInt(9 - from);
                        try (PreparedStatement move =
                                connection.prepareStatement("update purse set held = held + ? where id = ?")) {
                            move.setInt(1, -1);
                            move.setInt(2, from);
                            same(move.executeUpdate(), 1);
                            move.setInt(1, 1);
                            move.setInt(2, to);
                            same(move.executeUpdate(), 1);
                        }
                        if (turn % 5 == 0) {
                            connection.rollback();
                        } else {
                            connection.commit();
                        }
                    }
                }
                return null;
            }));
        }
        for (Future<Void> one : all) {
            one.get();
        }
        threads.shutdown();
        try (Connection connection = connect()) {
            same(one(connection, "select sum(held) from purse"), "1000");
        }
    }

    static void testTypes() throws Exception {
        String sql = "select ?::int2, ?::int8, ?::numeric, ?::float8, ?::text, ?::timestamptz, ?::uuid, ?::bytea, ?::int[],"
                + " ?::jsonb, ?::bool, ?::date";
        // From the second turn on in binary.
        try (Connection connection = connect("prepareThreshold", "1")) {
            for (int turn = 0; turn < 4; turn++) {
                try (PreparedStatement statement = connection.prepareStatement(sql)) {
                    UUID uuid = UUID.randomUUID();
                    Timestamp now = new Timestamp(1_700_000_000_123L);
                    statement.setShort(1, (short) -7);
                    statement.setLong(2, Long.MIN_VALUE);
                    statement.setBigDecimal(3, new BigDecimal("12345678901234567890.0123"));
                    statement.setDouble(4, 0.1);
                    statement.setString(5, "\u00e4\u4e2d\ud83d\ude00'\\");
                    statement.setTimestamp(6, now);
                    statement.setObject(7, uuid);
                    statement.setBytes(8, new byte[] {0, 1, -1});
                    statement.setArray(9, connection.createArrayOf("int4", new Integer[] {1, null, 3}));
                    statement.setString(10, "{\"a\": 1}");
                    statement.setNull(11, Types.BOOLEAN);
                    statement.setObject(12, java.time.LocalDate.of(2026, 2, 28));
                    ResultSet row = statement.executeQuery();
                    check(row.next(), "no row");
                    same(row.getShort(1), (short) -7);
                    same(row.getLong(2), Long.MIN_VALUE);
                    same(row.getBigDecimal(3), new BigDecimal("12345678901234567890.0123"));
                    same(row.getDouble(4), 0.1);
                    same(row.getString(5), "\u00e4\u4e2d\ud83d\ude00'\\");
                    same(row.getTimestamp(6), now);
                    same(row.getObject(7), uuid);
                    check(Arrays.equals(row.getBytes(8), new byte[] {0, 1, -1}), "other bytes");
                    check(Arrays.equals((Integer[]) row.getArray(9).getArray(), new Integer[] {1, null, 3}), "another array");
                    same(row.getString(10), "{\"a\": 1}");
                    row.getBoolean(11);
                    check(row.wasNull(), "not null");
                    same(row.getObject(12, java.time.LocalDate.class), java.time.LocalDate.of(2026, 2, 28));
                }
            }
        }
    }

    static void testLargeValues() throws Exception {
        byte[] large = new byte[20_000_000];
        new Random(1).nextBytes(large);
        try (Connection connection = connect();
                PreparedStatement statement = connection.prepareStatement("select ?::bytea, length(?::bytea)")) {
            statement.setBytes(1, large);
            statement.setBinaryStream(2, new ByteArrayInputStream(large), large.length);
            ResultSet row = statement.executeQuery();
            check(row.next(), "no row");
            check(Arrays.equals(row.getBytes(1), large), "other bytes");
            same(row.getInt(2), large.length);
        }
    }

    static void testSeveralResults() throws Exception {
        try (Connection connection = connect(); Statement statement = connection.createStatement()) {
            check(statement.execute("select 1; create table several(n int); insert into several values (1), (2); select 2"),
                    "no result");
            statement.getResultSet().next();
            check(!statement.getMoreResults() && statement.getUpdateCount() == 0, "create table");
            check(!statement.getMoreResults() && statement.getUpdateCount() == 2, "insert");
            check(statement.getMoreResults(), "no last result");
            // One transaction, by the simple protocol's rule.
            fails("22012", () -> statement.execute("insert into several values (3); select 1/0"));
            same(one(connection, "select count(*) from several"), "2");
        }
    }

    static void testGeneratedKeys() throws Exception {
        try (Connection connection = connect()) {
            run(connection, "create table keyed(id serial primary key, n int)");
            String sql = "insert into keyed(n) values (?)";
            try (PreparedStatement statement = connection.prepareStatement(sql, Statement.RETURN_GENERATED_KEYS)) {
                for (int n = 0; n < 3000; n++) {
                    statement.setInt(1, n);
                    statement.addBatch();
                }
                same(statement.executeBatch().length, 3000);
                same(count(statement.getGeneratedKeys()), 3000);
            }
        }
    }

    static void testBatch() throws Exception {
        for (String rewrite : new String[] {"false", "true"}) {
            try (Connection connection = connect("reWriteBatchedInserts", rewrite)) {
                run(connection, "drop table if exists batched; create table batched(n int primary key, t text)");
                String sql = "insert into batched values (?, ?)";
                try (PreparedStatement statement = connection.prepareStatement(sql)) {
                    for (int n = 0; n < 5000; n++) {
                        statement.setInt(1, n);
                        statement.setString(2, "x".repeat(n % 200));
                        statement.addBatch();
                    }
                    same(statement.executeBatch().length, 5000);
                    same(one(connection, "select count(*) from batched"), "5000");
                    // An error in the middle: nothing of the batch remains, and the session goes on.
                    for (int n = 9000; n > 4000; n--) {
                        statement.setInt(1, n);
                        statement.setString(2, "y");
                        statement.addBatch();
                    }
                    connection.setAutoCommit(false);
                    try {
                        statement.executeBatch();
                        check(false, "no BatchUpdateException");
                    } catch (BatchUpdateException error) {
                        same(error.getSQLState(), "23505");
                    }
                    connection.rollback();
                    same(one(connection, "select count(*) from batched"), "5000");
                    connection.commit();
                }
                try (Statement statement = connection.createStatement()) {
                    statement.addBatch("delete from batched where n < 10");
                    statement.addBatch("update batched set t = 'z' where n < 20");
                    check(Arrays.equals(statement.executeBatch(), new int[] {10, 10}), "other counts");
                    connection.commit();
                }
            }
        }
    }

    static void testMetadata() throws Exception {
        try (Connection connection = connect()) {
            run(connection, "create table described(id int primary key, name varchar(20) not null)");
            DatabaseMetaData all = connection.getMetaData();
            same(all.getDatabaseMajorVersion(), 15);
            try (ResultSet columns = all.getColumns(null, "public", "described", "%")) {
                check(columns.next() && columns.next() && !columns.next(), "not two columns");
            }
            try (ResultSet keys = all.getPrimaryKeys(null, null, "described")) {
                check(keys.next(), "no key");
                same(keys.getString("COLUMN_NAME"), "id");
            }
            try (PreparedStatement statement = connection.prepareStatement("select * from described where id = ?")) {
                same(statement.getParameterMetaData().getParameterType(1), Types.INTEGER);
                same(statement.getMetaData().isNullable(2), ResultSetMetaData.columnNoNulls);
            }
        }
    }

    static void testCalls() throws Exception {
        try (Connection connection = connect("escapeSyntaxCallMode", "callIfNoReturn")) {
            run(connection, "create procedure doubled(n int, inout m int) language plpgsql as $$ begin m = 2 * n; end $$;"
                    + "create function rows_of(r refcursor) returns refcursor language plpgsql as"
                    + " $$ begin open r for select generate_series(1, 300); return r; end $$");
            try (CallableStatement call = connection.prepareCall("{ ? = call upper(?) }")) {
                call.registerOutParameter(1, Types.VARCHAR);
                call.setString(2, "small");
                call.execute();
                same(call.getString(1), "SMALL");
            }
            try (CallableStatement call = connection.prepareCall("{ call doubled(?, ?) }")) {
                call.setInt(1, 21);
                call.setInt(2, 0);
                call.registerOutParameter(2, Types.INTEGER);
                call.execute();
                same(call.getInt(2), 42);
            }
            connection.setAutoCommit(false);
            try (CallableStatement call = connection.prepareCall("{ ? = call rows_of('named') }")) {
                call.registerOutParameter(1, Types.REF_CURSOR);
                call.execute();
                interfere();
                same(count((ResultSet) call.getObject(1)), 300);
            }
            connection.commit();
        }
    }

    // Transactions, errors and cursors.

    static void testAutosave() throws Exception {
        try (Connection connection = connect("autosave", "always")) {
            connection.setAutoCommit(false);
            run(connection, "create table saved(n int unique)");
            run(connection, "insert into saved values (1)");
            fails("23505", () -> run(connection, "insert into saved values (1)"));
            run(connection, "insert into saved values (2)");
            connection.commit();
            same(one(connection, "select count(*) from saved"), "2");
            connection.rollback();
        }
        try (Connection connection = connect("autosave", "never")) {
            connection.setAutoCommit(false);
            fails("22012", () -> one(connection, "select 1/0"));
            fails("25P02", () -> one(connection, "select 1"));
            connection.rollback();
            same(one(connection, "select 1"), "1");
        }
    }

    static void readChanging(Connection connection) throws SQLException {
        try (PreparedStatement statement = connection.prepareStatement("select * from changing")) {
            ResultSet row = statement.executeQuery();
            check(row.next(), "no row");
            same(row.getInt(1), 1);
        }
    }

    /** "cached plan must not change result type" is healed by the driver; inside of a transaction by its savepoint. */
    static void testResultTypeThatChanges() throws Exception {
        for (String autosave : new String[] {"conservative", "always"}) {
            for (boolean automatic : new boolean[] {true, false}) {
                try (Connection connection = connect("autosave", autosave, "prepareThreshold", "1");
                        Connection other = connect()) {
                    run(connection, "drop table if exists changing; create table changing(a int, b int)");
                    run(connection, "insert into changing values (1)");
                    readChanging(connection);
                    readChanging(connection);
                    run(other, "alter table changing add c text");
                    // First on a backend that does not know the statement, then where it was known all the time.
                    taken(connection, () -> {
                        connection.setAutoCommit(automatic);
                        readChanging(connection);
                        connection.setAutoCommit(true);
                    });
                    readChanging(connection);
                }
            }
        }
    }

    static void testSavepoints() throws Exception {
        try (Connection connection = connect()) {
            connection.setAutoCommit(false);
            run(connection, "create table points(n int)");
            Savepoint first = connection.setSavepoint("first");
            run(connection, "insert into points values (1)");
            Savepoint second = connection.setSavepoint();
            fails("22P02", () -> run(connection, "insert into points values ('x')"));
            connection.rollback(second);
            connection.releaseSavepoint(second);
            same(one(connection, "select count(*) from points"), "1");
            connection.rollback(first);
            same(one(connection, "select count(*) from points"), "0");
            connection.commit();
        }
    }

    static void testFetchSize() throws Exception {
        try (Connection connection = connect()) {
            connection.setAutoCommit(false);
            for (int turn = 0; turn < 7; turn++) {
                // Named statements and portals of different cursors, read by turns.
                try (PreparedStatement left = connection.prepareStatement("select generate_series(1, ?)");
                        PreparedStatement right = connection.prepareStatement("select generate_series(1, 3 * ?)")) {
                    left.setInt(1, 500);
                    left.setFetchSize(7);
                    right.setInt(1, 500);
                    right.setFetchSize(100);
                    ResultSet a = left.executeQuery();
                    ResultSet b = right.executeQuery();
                    for (int n = 1; n <= 250; n++) {
                        check(a.next() && b.next(), "no row");
                    }
                    interfere();
                    check(a.next(), "no row");
                    same(a.getInt(1), 251);
                    a.close();
                    for (int n = 251; n <= 1500; n++) {
                        check(b.next(), "no row");
                        same(b.getInt(1), n);
                    }
                    check(!b.next(), "one too many");
                }
                connection.commit();
            }
        }
        // All of it at once, outside of a transaction.
        try (Connection connection = connect(); Statement statement = connection.createStatement()) {
            statement.setFetchSize(10);
            same(count(statement.executeQuery("select generate_series(1, 1000)")), 1000);
        }
    }

    static void testScrollAndUpdate() throws Exception {
        try (Connection connection = connect()) {
            run(connection, "create table scrolled(id int primary key, t text);"
                    + "insert into scrolled select n, 'old' from generate_series(1, 20) n");
            try (Statement statement =
                    connection.createStatement(ResultSet.TYPE_SCROLL_INSENSITIVE, ResultSet.CONCUR_UPDATABLE)) {
                ResultSet rows = statement.executeQuery("select * from scrolled order by id");
                check(rows.last() && rows.getInt(1) == 20 && rows.absolute(5), "cannot scroll");
                rows.updateString(2, "new");
                rows.updateRow();
                rows.moveToInsertRow();
                rows.updateInt(1, 21);
                rows.updateString(2, "new");
                rows.insertRow();
            }
            same(one(connection, "select count(*) from scrolled where t = 'new'"), "2");
        }
    }

    static void testCursorAcrossTransactions() throws Exception {
        try (Connection connection = connect()) {
            connection.setAutoCommit(false);
            connection.setHoldability(ResultSet.HOLD_CURSORS_OVER_COMMIT);
            try (Statement statement = connection.createStatement()) {
                statement.setFetchSize(10);
                ResultSet rows = statement.executeQuery("select generate_series(1, 100)");
                check(rows.next(), "no row");
                connection.commit();
                interfere();
                // pgjdbc reads them all at once when they shall outlast the transaction.
                int seen = 1;
                while (rows.next()) {
                    seen++;
                }
                same(seen, 100);
            }
        }
    }

    // Cancels.

    static void cancelled(Statement statement, String mark) throws Exception {
        Thread cancelling = new Thread(() -> {
            try {
                untilActive(mark);
                statement.cancel();
            } catch (Exception error) {
                error.printStackTrace();
            }
        });
        cancelling.start();
        fails("57014", () -> statement.execute("select pg_sleep(600) /* " + mark + " */"));
        cancelling.join();
    }

    static void testCancel() throws Exception {
        try (Connection connection = connect(); Statement statement = connection.createStatement()) {
            for (int turn = 0; turn < 5; turn++) {
                cancelled(statement, "cancel_me_" + turn);
                interfere();
            }
            connection.setAutoCommit(false);
            cancelled(statement, "cancel_in_transaction");
            fails("25P02", () -> one(connection, "select 1"));
            connection.rollback();
            // One that comes too late ends nothing.
            statement.cancel();
            same(one(connection, "select 1"), "1");
        }
    }

    static void testQueryTimeout() throws Exception {
        try (Connection connection = connect();
                PreparedStatement statement = connection.prepareStatement("select pg_sleep(?)")) {
            statement.setQueryTimeout(1);
            statement.setDouble(1, 600);
            fails("57014", statement::executeQuery);
            statement.setDouble(1, 0);
            check(statement.executeQuery().next(), "no row");
        }
    }

    // COPY and large objects.

    static void testCopy() throws Exception {
        try (Connection connection = connect()) {
            CopyManager copy = connection.unwrap(PGConnection.class).getCopyAPI();
            run(connection, "create table copied(n int, t text)");
            StringBuilder text = new StringBuilder();
            for (int n = 1; n <= 50_000; n++) {
                text.append(n).append("\trow \u00e4 ").append(n).append('\n');
            }
            same(copy.copyIn("copy copied from stdin", new StringReader(text.toString())), 50_000L);
            StringWriter out = new StringWriter();
            same(copy.copyOut("copy (select * from copied order by n) to stdout", out), 50_000L);
            same(out.toString(), text.toString());
            // The server refuses the third line.
            fails("22P02", () -> copy.copyIn("copy copied from stdin", new StringReader("1\ta\n2\tb\nx\tc\n")));
            // The client gives up.
            CopyIn in = copy.copyIn("copy copied from stdin");
            byte[] line = "7\tseven\n".getBytes(StandardCharsets.UTF_8);
            in.writeToCopy(line, 0, line.length);
            in.cancelCopy();
            same(one(connection, "select count(*) from copied"), "50000");
        }
    }

    /** Given up half-way; the driver is out of step with its own session then, so that is closed. */
    static void testCopyLeftHalfWay() throws Exception {
        for (boolean cancel : new boolean[] {true, false}) {
            try (Connection connection = connect()) {
                CopyManager copy = connection.unwrap(PGConnection.class).getCopyAPI();
                CopyOut unread = copy.copyOut("copy (select generate_series(1, 1000000000000)) to stdout");
                check(unread.readFromCopy() != null, "no line");
                if (cancel) {
                    unread.cancelCopy();
                    fails("57014", () -> one(connection, "select 1"));
                }
            }
            interfere();
        }
    }

    static void testCopyBinaryStream() throws Exception {
        try (Connection connection = connect()) {
            PGConnection own = connection.unwrap(PGConnection.class);
            run(connection, "create table streamed(n int)");
            try (Writer out = new OutputStreamWriter(
                    new PGCopyOutputStream(own, "copy streamed from stdin", 1000), StandardCharsets.UTF_8)) {
                for (int n = 0; n < 20_000; n++) {
                    out.write(n + "\n");
                }
            }
            same(one(connection, "select count(*) from streamed"), "20000");
        }
    }

    /** By the protocol's FunctionCall. */
    static void testLargeObjects() throws Exception {
        byte[] bytes = new byte[300_000];
        new Random(2).nextBytes(bytes);
        try (Connection connection = connect()) {
            connection.setAutoCommit(false);
            LargeObjectManager objects = connection.unwrap(PGConnection.class).getLargeObjectAPI();
            long id = objects.createLO(LargeObjectManager.READWRITE);
            LargeObject object = objects.open(id, LargeObjectManager.WRITE);
            object.write(bytes);
            object.close();
            connection.commit();
            interfere();
            object = objects.open(id, LargeObjectManager.READ);
            object.seek(1000);
            check(Arrays.equals(object.read(bytes.length), Arrays.copyOfRange(bytes, 1000, bytes.length)), "other bytes");
            object.close();
            objects.delete(id);
            connection.commit();
            fails("42704", () -> objects.open(id, LargeObjectManager.READ));
            connection.rollback();
        }
    }

    // What belongs to a session.

    static void testListen() throws Exception {
        try (Connection connection = connect(); Connection other = connect()) {
            run(connection, "listen news");
            run(other, "notify news, 'heard'");
            org.postgresql.PGNotification[] heard = connection.unwrap(PGConnection.class).getNotifications(1000 * Integer.parseInt(System.getenv("PATIENCE")));
            check(heard != null && heard.length == 1, "not heard");
            same(heard[0].getParameter(), "heard");
        }
    }

    static void testTemporaryTable() throws Exception {
        try (Connection connection = connect()) {
            // In one transaction: the next may have another backend.
            connection.setAutoCommit(false);
            run(connection, "create temporary table mine(n int)");
            String former = one(connection, "select pg_backend_pid()");
            connection.setAutoCommit(true);
            taken(former, () -> run(connection, "insert into mine values (1)"));
            same(one(connection, "select count(*) from mine"), "1");
        }
    }
}
